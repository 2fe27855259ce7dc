"""What lmms-eval's entry-point group `lmms_eval.models` finds: names, no imports of ours.

A payload that fails to import would drop every later plugin with a mere log warning, so this file
imports nothing but lmms-eval's own registry, which is loaded by then.
"""

from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> tuple[ModelManifest, ...]:
    """The model id `internvideo3` and its alias `iv3`, for `lmms-eval --model`."""
    return (
        ModelManifest(
            model_id="internvideo3",
            chat_class_path="internvideo3.harness.lmms.InternVideo3",
            aliases=("iv3",),
        ),
    )
