"""Calls are read from ids, checked against their schema, and repaired by what the message says.

pytest tests/agent/test_actions.py
"""

import json
from typing import Any

import pytest

from internvideo3.harness.agent.actions import (
    ACTIONS,
    Answer,
    Malformed,
    Verify,
    Zoom,
    parse_call,
    read_call,
    signatures,
)
from internvideo3.harness.agent.quoting import Quoter
from internvideo3.model.scale.build import load_processor

ZOOM = '{"name": "zoom", "arguments": {"start_s": 3, "end_s": 5.5}}'


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_processor().tokenizer


def test_every_action_has_a_signature_that_is_json_schema() -> None:
    functions = [json.loads(line)["function"] for line in signatures().splitlines()]
    assert [one["name"] for one in functions] == list(ACTIONS)
    for one in functions:
        assert one["description"] and one["parameters"]["type"] == "object"
        assert one["parameters"]["additionalProperties"] is False
        assert "name" not in one["parameters"]["properties"]


def test_calls_are_read_as_they_are_meant() -> None:
    assert parse_call(ZOOM) == Zoom(start_s=3, end_s=5.5)
    assert parse_call('{"name": "answer", "arguments": {"text": "B"}}') == Answer(text="B")
    claims = [{"text": "red", "evidence": ["e2"], "start_s": 1, "end_s": 2}]
    call = parse_call(json.dumps({"name": "verify", "arguments": {"claims": claims}}))
    assert isinstance(call, Verify) and call.claims[0].evidence == ("e2",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("zoom(3, 5)", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "no name"),
        ('{"arguments": {}}', "no name"),
        ('{"name": 7}', "no name"),
        ('{"name": "zoom", "arguments": [3, 5]}', "name and arguments only"),
        ('{"name": "zoom", "start_s": 3}', "name and arguments only"),
        ('{"name": "zom", "arguments": {}}', "Did you mean zoom?"),
        ('{"name": "rm -rf /", "arguments": {}}', "Tools: zoom, "),
        ('{"name": "zoom", "arguments": {"name": "answer"}}', "no argument 'name'"),
        ('{"name": "zoom", "arguments": {"start_s": 5, "end_s": 3}}', "must be greater than"),
        ('{"name": "zoom", "arguments": {"start_s": -1}}', "start_s: Input should be greater"),
        ('{"name": "zoom", "arguments": {"start_s": NaN}}', "start_s: Input should be"),
        ('{"name": "zoom", "arguments": {"start_s": 1e999}}', "start_s: Input should be"),
        ('{"name": "zoom", "arguments": {"fps": 1000}}', "fps: Input should be less"),
        ('{"name": "zoom", "arguments": {"speed": 2}}', "speed: Extra inputs"),
        ('{"name": "answer", "arguments": {}}', "text: Field required"),
        ('{"name": "verify", "arguments": {"claims": []}}', "claims: Tuple should have at least"),
    ],
)
def test_a_malformed_call_says_how_to_repair_it(text: str, said: str) -> None:
    call = parse_call(text)
    assert isinstance(call, Malformed) and said in call.problem
    assert "parameters" in call.problem or '"arguments"' in call.problem or "Tools" in call.problem


def test_a_call_counts_only_between_markers_that_the_model_wrote(tokenizer: Any) -> None:
    quoter = Quoter(tokenizer)
    call = f"<tool_call>\n{ZOOM}\n</tool_call>"
    assert read_call(quoter.control(f"Let me see. {call}<|im_end|>"), tokenizer) == Zoom(
        start_s=3, end_s=5.5
    )
    assert read_call(quoter.quote(call), tokenizer) is None
    assert read_call(quoter.control("B<|im_end|>"), tokenizer) is None
    unclosed = read_call(quoter.control(f"<tool_call>\n{ZOOM}"), tokenizer)
    assert isinstance(unclosed, Malformed) and "no closing </tool_call>" in unclosed.problem


def test_hostile_text_is_no_call(tokenizer: Any, hostile: tuple[str, ...]) -> None:
    quoter = Quoter(tokenizer)
    assert [text for text in hostile if read_call(quoter.quote(text), tokenizer)] == []
    for text in hostile:
        inside = parse_call(text[:10_000])
        # One of them is the JSON of an answer: data, if the model itself repeats it as a call.
        assert isinstance(inside, Malformed) or text.startswith('{"name": "answer"')
