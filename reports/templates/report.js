"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const glyphs = [...document.querySelectorAll("template.glyphs")];
  const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
  const list = byId("list");
  const panel = byId("sample");
  let shown = [];
  let at = 0;

  /* Text from runs only ever enters the page through textContent. */
  const make = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined && text !== null) node.textContent = text;
    return node;
  };
  const glyph = (system) => {
    const node = glyphs[system].content.cloneNode(true);
    return node;
  };
  const seconds = (value) => `${Number(value.toFixed(2))} s`;
  const isRight = (answer) => answer && answer.value !== null && answer.value >= data.rightFrom;
  const isUnread = (answer) => answer && answer.outcome !== "answered";
  const graded = (sample) => sample.kind !== "choice";

  const verdict = (answer, sample) => {
    if (!answer) return ["", "not run"];
    if (answer.outcome === "error") return ["unread", "failed"];
    if (answer.outcome !== "answered") return ["unread", answer.outcome.replace("_", " ")];
    const right = isRight(answer);
    const word = right ? "right" : "wrong";
    const score = graded(sample) ? ` ${answer.value.toFixed(2)}` : "";
    return [word, `${right ? "✓" : "✗"} ${graded(sample) ? "score" + score : word}`];
  };

  /* Filters */
  const choose = (select, entries) => {
    const before = select.value;
    select.replaceChildren(...entries.map(([value, text]) => {
      const option = make("option", "", text);
      option.value = value;
      return option;
    }));
    if (entries.some(([value]) => value === before)) select.value = before;
  };
  const families = (suite) => {
    const samples = data.samples.filter((s) => !suite || s.suite === suite);
    return [...new Set(samples.map((s) => s.family))].sort();
  };
  const results = [["", "all"], ["differ", "systems differ"], ["unread", "unreadable or failed"]];
  data.systems.forEach((system, i) => {
    results.push([`right${i}`, `${system.name} right`], [`wrong${i}`, `${system.name} wrong`]);
  });
  /* Won and lost as the table of paired differences counts them. */
  data.pairs.forEach(([a, b]) => {
    const [first, second] = [data.systems[a].name, data.systems[b].name];
    results.push([`pair${b}-${a}`, `${second} better than ${first}`]);
    results.push([`pair${a}-${b}`, `${first} better than ${second}`]);
  });
  const better = (sample, pair) => {
    const [one, other] = pair.split("-").map((i) => sample.answers[Number(i)]);
    const scored = [one, other].every((answer) => answer && answer.value !== null);
    return scored && one.value > other.value;
  };
  const matches = (sample, result) => {
    if (!result) return true;
    if (result.startsWith("pair")) return better(sample, result.slice(4));
    if (result === "unread") return sample.answers.some(isUnread);
    if (result === "differ") {
      const marks = sample.answers.filter(Boolean).map((a) => Boolean(isRight(a)));
      return new Set(marks).size > 1;
    }
    const answer = sample.answers[Number(result.slice(5))];
    return Boolean(answer) && Boolean(isRight(answer)) === result.startsWith("right");
  };
  const filter = () => {
    const suite = byId("filter-suite").value;
    choose(byId("filter-family"), [["", "all"], ...families(suite).map((f) => [f, data.families[f]])]);
    const family = byId("filter-family").value;
    const result = byId("filter-result").value;
    shown = data.samples.filter((s) => (!suite || s.suite === suite)
      && (!family || s.family === family) && matches(s, result));
    const n = shown.length;
    byId("filter-count").textContent = `${n} question${n === 1 ? "" : "s"}`;
    list.replaceChildren(...shown.map(item));
    select(0);
  };

  const item = (sample, i) => {
    const node = make("div", "item");
    node.id = `item-${i}`;
    node.setAttribute("role", "option");
    const title = make("span", "", data.families[sample.family]);
    const length = sample.seconds === null ? "" : ` · ${seconds(sample.seconds)}`;
    title.append(make("small", "", data.suites[sample.suite] + length));
    const marks = make("span", "marks");
    sample.answers.forEach((answer, s) => {
      const [kind] = verdict(answer, sample);
      const mark = make("span", `mark ${kind}`, { right: "✓", wrong: "✗", unread: "?" }[kind] || "·");
      mark.title = `${data.systems[s].name}: ${kind || "not run"}`;
      marks.append(mark);
    });
    node.append(title, marks);
    node.addEventListener("click", () => select(i));
    return node;
  };

  /* One sample */
  const select = (index) => {
    if (!shown.length) {
      panel.replaceChildren(make("p", "caption", "No question matches these filters."));
      list.removeAttribute("aria-activedescendant");
      return;
    }
    at = Math.max(0, Math.min(shown.length - 1, index));
    [...list.children].forEach((node, i) => node.setAttribute("aria-selected", String(i === at)));
    const node = list.children[at];
    list.setAttribute("aria-activedescendant", node.id);
    const top = node.offsetTop;
    if (top < list.scrollTop) list.scrollTop = top - 6;
    const bottom = top + node.offsetHeight;
    if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight + 6;
    show(shown[at]);
  };

  const show = (sample) => {
    const parts = [bar(sample), frames(sample), timeline(sample), make("h3", "", sample.question)];
    parts.push(sample.options.length ? options(sample) : truth(sample));
    parts.push(answers(sample));
    const focused = document.activeElement && document.activeElement.id;
    panel.replaceChildren(...parts.filter(Boolean));
    if (focused === "previous" || focused === "next") {
      const again = byId(focused);
      (again.disabled ? byId(focused === "next" ? "previous" : "next") : again).focus();
    }
  };

  const bar = (sample) => {
    const node = make("div", "bar");
    const where = [data.suites[sample.suite], data.families[sample.family]];
    if (sample.seconds !== null) where.push(`${seconds(sample.seconds)} video`);
    node.append(make("span", "where", `${where.join(" · ")} · ${sample.id}`));
    const step = make("span", "step");
    const button = (id, text, to) => {
      const b = make("button", "", text);
      b.id = id;
      b.type = "button";
      b.disabled = to < 0 || to >= shown.length;
      b.addEventListener("click", () => select(to));
      return b;
    };
    step.append(button("previous", "Previous", at - 1), make("small", "", `${at + 1} / ${shown.length}`),
      button("next", "Next", at + 1));
    node.append(step);
    return node;
  };

  const frames = (sample) => {
    if (!sample.frames.length) return null;
    const node = make("div", "frames");
    sample.frames.forEach((frame) => {
      const figure = make("figure", frame.evidence ? "seen" : "");
      const image = make("img");
      image.src = data.images[frame.image];
      image.alt = `Frame at ${seconds(frame.t)}${frame.evidence ? ", where the answer can be seen" : ""}`;
      const caption = make("figcaption", "", seconds(frame.t));
      if (frame.evidence) caption.append(make("span", "", " · evidence"));
      figure.append(image, caption);
      node.append(figure);
    });
    return node;
  };

  const timeline = (sample) => {
    if (sample.seconds === null || !sample.evidence.length) return null;
    const node = make("div", "timeline");
    const row = (label, spans, kind, note) => {
      const track = make("span", "track");
      spans.forEach(([a, b]) => {
        const piece = make("i", kind);
        const from = Math.max(0, Math.min(a, sample.seconds));
        const to = Math.max(from, Math.min(b, sample.seconds));
        piece.style.left = `${100 * from / sample.seconds}%`;
        piece.style.width = `${100 * (to - from) / sample.seconds}%`;
        track.append(piece);
      });
      node.append(make("span", "", label), track, make("span", "", note));
    };
    row("evidence", sample.evidence, "", seconds(sample.seconds));
    sample.answers.forEach((answer, i) => {
      if (answer && answer.span) {
        const hollow = glyphs[i].content.querySelector(".glyph-control");
        const spans = [[Math.min(...answer.span), Math.max(...answer.span)]];
        row(data.systems[i].name, spans, hollow ? "cc" : `c${i % 6}`, answer.value.toFixed(2));
      }
    });
    return node;
  };

  const options = (sample) => {
    const node = make("ul", "options");
    sample.options.forEach((text, i) => {
      const row = make("li", text === sample.answer ? "true" : "");
      row.append(make("span", "key", letters[i] || ""), make("span", "", text));
      const picks = make("span", "picks");
      sample.answers.forEach((answer, s) => {
        if (answer && answer.choice === i) picks.append(glyph(s));
      });
      row.append(picks);
      node.append(row);
    });
    return node;
  };

  const truth = (sample) => {
    const node = make("p", "truth", "Answer: ");
    node.append(make("b", "", sample.answer + (sample.kind === "span" ? " s" : "")));
    return node;
  };

  const answers = (sample) => {
    const node = make("div", "answers");
    sample.answers.forEach((answer, i) => {
      if (!answer) return;
      const row = make("div");
      const [kind, word] = verdict(answer, sample);
      const text = answer.text === null ? answer.error || "no answer" : answer.text;
      const said = make("span", text.trim() ? "said" : "said empty", text.trim() ? text : "(empty)");
      const plain = answer.plain !== null && Math.abs(answer.plain - (answer.value || 0)) > 1e-9;
      const note = plain ? `${word} · plain ${answer.plain.toFixed(2)}` : word;
      const name = make("span", "who", data.systems[i].name);
      row.append(glyph(i), name, said, make("span", `verdict ${kind}`, note));
      node.append(row);
    });
    return node;
  };

  /* Keys: j and k anywhere, arrows inside the browser. */
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target instanceof Element && event.target.closest("select, input, textarea")) return;
    const inside = event.target instanceof Element && event.target.closest("#browser");
    const step = { j: 1, k: -1 }[event.key]
      || (inside && { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key]);
    const end = inside && { Home: 0, End: shown.length - 1 }[event.key];
    if (!step && !Number.isInteger(end)) return;
    event.preventDefault();
    select(step ? at + step : end);
    const box = byId("browser").getBoundingClientRect();
    if (box.bottom < 120 || box.top > window.innerHeight - 120) byId("answers").scrollIntoView();
  });

  choose(byId("filter-suite"), [["", "all"], ...Object.entries(data.suites)]);
  choose(byId("filter-result"), results);
  ["suite", "family", "result"].forEach((name) => {
    byId(`filter-${name}`).addEventListener("change", filter);
  });
  byId("browser").hidden = false;
  filter();
})();
