/* The token map: outline | tokens | card. It draws one Arrow table and never asks the server; only the reader's position goes back.
   tokens_text.js, tokens_state.js, tokens_blocks.js, tokens_colors.js, tokens_card.js and tokens_moves.js stand before this file in the same module. */

/* ---- events ---- */
const ACTIONS = {
  "turn-": m => goTurn(m, m.turn - 1), "turn+": m => goTurn(m, m.turn + 1), "spike-": m => goSpike(m, -1), "spike+": m => goSpike(m, 1),
  "least-": m => goLeast(m, -1), "least+": m => goLeast(m, 1), play: m => play(m, !m.playing), fold: foldAll,
  go: (m, b) => goTurn(m, +b.dataset.k), token: (m, b) => goToken(m, +b.dataset.i),
  link: async (m, b) => { await navigator.clipboard.writeText(location.href); b.textContent = "Copied"; setTimeout(() => { b.textContent = "Copy link"; }, 1500); },
};
const KEYS = {h: ACTIONS["turn-"], l: ACTIONS["turn+"], n: ACTIONS["spike+"], p: ACTIONS["spike-"], u: ACTIONS["least+"], U: ACTIONS["least-"], k: ACTIONS.play, o: foldAll,
              m: m => nextMetric(m, 1), M: m => nextMetric(m, -1)};

function onKey(m, ev) {
  const target = ev.composedPath()[0], tag = target.tagName;
  if (ev.ctrlKey || ev.metaKey || ev.altKey || !m.facts || !m.host.host?.isConnected) return;
  if (tag === "TEXTAREA" || tag === "SELECT" || target.isContentEditable || (tag === "INPUT" && target.type !== "range") || document.querySelector("[role=dialog]")) return;
  const arrow = {ArrowRight: 1, ArrowLeft: -1}[ev.key];
  if (arrow && target === m.pane) { goToken(m, m.token === null ? frameWindow(m) : m.token + arrow); ev.preventDefault(); }
  else if (KEYS[ev.key]) { KEYS[ev.key](m); ev.preventDefault(); }
}
function onScroll(m) {   /* the current turn follows what is on the screen, once a frame */
  m.scrolling ??= requestAnimationFrame(() => {
    m.scrolling = null;
    if (!m.n) return;
    ensure(m);
    const k = m.turnOf[Math.min(m.n - 1, frameWindow(m))];
    if (performance.now() > m.quietUntil && k !== m.turn) { m.turn = k; mark(m); note(m, false); }
  });
}
function listen(m) {
  m.app.addEventListener("click", ev => {
    const b = ev.target.closest("[data-do]"), act = ACTIONS[b?.dataset.do], e = ev.target.closest(".b > span");
    if (act) act(m, b);
    else if (e && getSelection().isCollapsed !== false) goToken(m, e.at);
  });
  m.app.addEventListener("toggle", ev => { if (ev.target.open) fill(m, ev.target); unfolded(m); ensure(m); frameWindow(m); }, true);
  m.select.addEventListener("change", () => setMetric(m, m.select.value));
  m.slider.addEventListener("input", () => goTurn(m, +m.slider.value));
  m.pane.addEventListener("scroll", () => onScroll(m), {passive: true});
  m.pane.addEventListener("mousemove", ev => { const e = ev.target.closest(".b > span"); if (e && !e.title) tip(m, e); });
  m.$(".mini").addEventListener("pointerdown", ev => { ev.currentTarget.setPointerCapture(ev.pointerId); dragWindow(m, ev); });
  m.$(".mini").addEventListener("pointermove", ev => dragWindow(m, ev));
  new ResizeObserver(() => { if (m.facts) minimap(m); }).observe(m.canvas.parentNode);
}

/* ---- a trajectory arrives ---- */
function load(m, data) {   /* the columns of its table, and what follows from them */
  const table = data.tokens, column = name => table.getChild(name), pieces = column("text"), n = table.numRows, control = new Set(data.facts.control);
  Object.assign(m, {facts: data.facts, version: data.facts.version, opened: JSON.stringify(data.facts.at), n, text: Array.from({length: n}, (_, i) => pieces.get(i) ?? ""),
                    id: column("id").toArray(), mask: column("mask").toArray(), turnOf: new Int32Array(n), wrote: [], spans: new Array(n), blocks: [], token: null, turn: 0,
                    column: Object.fromEntries(data.facts.metrics.map(x => [x.name, column(x.name).toArray()])), perLine: Math.max(20, (m.pane.clientWidth - 60) / 7.8)});
  m.suffix = m.text.map(s => (control.has(s) ? " k" : "") + (RIGHT_TO_LEFT.test(s) ? " r" : ""));
  for (let i = 0; i < n; i++) if (m.mask[i]) m.wrote.push(i);
  m.facts.turns.forEach((t, k) => t.parts.forEach(([a, b]) => m.turnOf.fill(k, a, b)));
}
function options(m) {   /* the metrics to choose from, by group */
  m.select.replaceChildren(...Object.entries(Object.groupBy(m.facts.metrics, x => x.group)).map(([label, metrics]) => {
    const g = document.createElement("optgroup");
    g.label = label; g.append(...metrics.map(x => new Option(x.label, x.name)));
    return g;
  }));
  m.select.value = m.metric;
}
function show(m, data) {
  const begun = performance.now(), asked = m.sending ? m.metric : data.facts.at.metric;   /* a metric that the server does not know yet goes first */
  stopAll(m); load(m, data);
  m.metric = [asked, m.metric].find(name => m.facts.scales[name]) ?? m.facts.metrics[0]?.name ?? "";
  m.classes = classesOf(m);
  options(m);
  m.slider.max = Math.max(0, m.facts.turns.length - 1);
  m.$(".outline").innerHTML = m.facts.turns.map(outlineHtml).join("");
  m.card.innerHTML = NOTHING;
  m.pane.innerHTML = promptHtml(m) + (m.facts.turns.map((t, k) => turnHtml(m, t, k)).join("") || '<p class="dim">The completion is empty.</p>');
  m.pane.scrollTop = 0; collect(m, m.pane); ensure(m); restLater(m);
  m.$('[data-do="fold"]').textContent = "Open tool output"; m.$('[data-do="fold"]').hidden = !m.pane.querySelector("details[data-from]");
  paint(m, begun); mark(m);
  goTo(m, m.facts.at);
  m.app.dataset.built = Math.round(performance.now() - begun);
}
function mount(host) {
  const m = newMap(host), keys = ev => onKey(m, ev);
  listen(m);
  return {
    update(data, send) {
      m.send = send; addEventListener("keydown", keys);
      const opened = JSON.stringify(data.facts.at);
      if (data.facts.version !== m.version) show(m, data);
      else if (opened !== m.opened) { m.opened = opened; goTo(m, data.facts.at); }   /* another address, the same trajectory */
      else note(m, false);
    },
    stop() { removeEventListener("keydown", keys); if (m.facts) stopAll(m); },
  };
}

export default function ({data, parentElement, setStateValue}) {
  const map = parentElement.tokenMap ??= mount(parentElement);
  map.update(data, setStateValue);
  return () => map.stop();
}
