/* Text of the token map: turns, their blocks, and a span for each token. A block is built when it comes near the screen, the others when the browser is idle. */
const BLOCK = 192, LONGEST = 1024, LINE = 22;   /* tokens after which a block may end, and must; pixels of a line */
const later = window.requestIdleCallback ?? (f => setTimeout(() => f({timeRemaining: () => 8}), 30)), notLater = window.cancelIdleCallback ?? clearTimeout;
const NAMES = Array.from({length: CLASSES + 1}, (_, k) => k ? `c${k - 1}` : "u");   /* class of a token that the model wrote, by its colour class + 1 */

function spanHtml(m, i) {
  const name = m.mask[i] ? (m.classes ? NAMES[m.classes[i] + 1] : "") : "o";
  return `<span class="${name}${m.suffix[i]}">${safe(m.text[i]) || "<i>∅</i>"}</span>`;
}
function linesHtml(m, from, to) {   /* blocks that end where a line ends; each is empty, and as tall as it will probably be, until `build` */
  let out = "", start = from, size = 0, tall = 0;
  for (let i = from; i < to; i++) {
    const text = m.text[i];
    size++; tall += text.length / m.perLine + text.includes("\n") / 2;
    if (i + 1 === to || (size >= BLOCK && text.endsWith("\n")) || size >= LONGEST || (size > 1 && text.length > 4e4)) {
      const px = Math.ceil(tall) * LINE;
      out += `<div class="b" data-i="${start}" data-to="${i + 1}" style="min-height:${px}px;contain-intrinsic-size:auto ${px}px"></div>`;
      start = i + 1; size = tall = 0;
    }
  }
  return out;
}
function collect(m, root) {   /* the blocks inside an element */
  for (const el of root.querySelectorAll(".b")) m.blocks.push({el, from: +el.dataset.i, to: +el.dataset.to, fold: el.closest("details"), built: false});
  m.blocks.sort((a, b) => a.from - b.from);
  unfolded(m);
}
function unfolded(m) { m.shown = m.blocks.filter(b => !b.fold || b.fold.open); }
function build(m, b) {
  if (b.built) return;
  let html = "", i = b.from;
  for (let j = b.from; j < b.to; j++) html += spanHtml(m, j);
  b.el.innerHTML = html; b.el.style.minHeight = ""; b.built = true;
  for (const e of b.el.children) { m.spans[i] = e; e.at = i++; }
}
function blockAt(m, y) {   /* the last block that begins above a height of the window */
  let a = 0, b = m.shown.length - 1;
  while (a < b) { const mid = (a + b + 1) >> 1; m.shown[mid].el.getBoundingClientRect().top <= y ? a = mid : b = mid - 1; }
  return a;
}
function ensure(m) {   /* build what is on the screen, and half a screen around it */
  const box = m.pane.getBoundingClientRect(), around = box.height / 2;
  for (let round = 0; round < 5; round++) {
    const wanted = [];
    for (let k = blockAt(m, box.top - around); k < m.shown.length && m.shown[k].el.getBoundingClientRect().top < box.bottom + around; k++) if (!m.shown[k].built) wanted.push(m.shown[k]);
    if (!wanted.length) return;
    wanted.forEach(b => build(m, b));
  }
}
function rest(m, time) {   /* build the others when the browser is idle, so that they can be searched */
  for (let k = 0; k < 4 || time.timeRemaining() > 4; k++) {
    while (m.nextBlock < m.blocks.length && m.blocks[m.nextBlock].built) m.nextBlock++;
    if (m.nextBlock >= m.blocks.length) { m.app.dataset.whole = 1; m.idle = null; return; }
    build(m, m.blocks[m.nextBlock]);
  }
  m.idle = later(t => rest(m, t), {timeout: 300});
}
function restLater(m) { delete m.app.dataset.whole; m.nextBlock = 0; notLater(m.idle); m.idle = later(t => rest(m, t), {timeout: 1000}); }
function fill(m, box) {   /* prompt or tool output, the first time it is opened */
  const inner = box.lastElementChild;
  if (box.full) return;
  box.full = true;
  if (box.dataset.from === undefined) inner.innerHTML = safe(m.facts.prompt);
  else { inner.innerHTML = linesHtml(m, +box.dataset.from, +box.dataset.to); collect(m, inner); ensure(m); restLater(m); }
}
function foldAll(m) {   /* open all tool output, or fold it, without moving the turn on the screen */
  const boxes = [...m.pane.querySelectorAll("details[data-from]")], open = boxes.some(b => !b.open);
  const s = sections(m)[m.turn], top = s?.getBoundingClientRect().top;
  for (const b of boxes) { if (open) fill(m, b); b.open = open; }
  unfolded(m);
  if (s) { m.quietUntil = performance.now() + 300; m.pane.scrollTop += s.getBoundingClientRect().top - top; }
  m.$('[data-do="fold"]').textContent = open ? "Fold tool output" : "Open tool output";
}

/* ---- turns ---- */
function toolHtml(m, from, to, error) {
  let first = "";
  for (let i = from; i < to && first.length < 600; i++) first += m.text[i].slice(0, 600);
  first = first.replace(/<\|[^<>|]{1,40}\|>|<\/?tool_response>/g, " ").replace(/^\s*(?:user|tool|ipython|environment)\s*\n/, " ").trim().split("\n")[0].slice(0, 140);
  return `<details class="tool${error ? " err" : ""}" data-from="${from}" data-to="${to}"><summary><b>${error ? "✖ error" : "tool"}</b><span class="first">${safe(first)}</span>` +
         `<span class="dim">${plural(to - from, m.facts.unit)}</span></summary><div class="text hatched"></div></details>`;
}
function turnHtml(m, t, k) {
  const parts = t.parts.map(([a, b, wrote], p) => wrote ? `<div class="text">${linesHtml(m, a, b)}</div>` : toolHtml(m, a, b, t.errors.includes(p)));
  const numbers = [["reward", t.reward], ["advantage", t.advantage]].filter(x => known(x[1])).map(([name, v]) => `<span>${name} <b>${signed(v)}</b></span>`);
  const scores = Object.entries(t.scores || {}).filter(x => known(x[1]) && x[1]).map(([name, v]) => `<span title="turn reward, without weight">${safe(name)} <b>${signed(v)}</b></span>`);
  const kl = Object.entries(t.kl).map(([name, v]) => `<span title="KL from the recorded policy to ${safe(name)}, estimated from the tokens of this turn (k3), nats">KL ${safe(name)} <b>${number(v)}</b></span>`);
  return `<section data-k="${k}" aria-label="Turn ${t.turn + 1}"><header><b>Turn ${t.turn + 1}</b>${kindChip(t)}<span class="dim">${plural(t.tokens, m.facts.unit)}</span>` +
         `<span class="numbers">${numbers.join("")}${scores.join("")}${kl.join("")}</span></header>${parts.join("")}</section>`;
}
function outlineHtml(t, k) {
  const failed = t.errors.length ? `<span class="bad" title="a tool answered with an error">✖</span>` : "";
  const reward = known(t.reward) && t.reward ? signed(t.reward) : "";
  return `<button data-do="go" data-k="${k}"><span class="no">${t.turn + 1}</span>${kindChip(t)}${failed}<span class="adv" title="reward of the turn">${reward}</span></button>`;
}
function promptHtml(m) {
  if (!m.facts.prompt) return "";
  return `<details class="prompt"><summary><b>Prompt</b><span class="dim">${plural(m.facts.prompt_tokens, m.facts.unit)}</span></summary><div class="text hatched"></div></details>`;
}
