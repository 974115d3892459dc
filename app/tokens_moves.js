/* Moving about in the token map: turns, tokens, spikes, play, and the address of the page. */
function note(m, tell = true) {   /* write the reader's position into the address, and tell the server */
  const url = new URL(location), put = (k, v) => v === null ? url.searchParams.delete(k) : url.searchParams.set(k, v);
  put("metric", m.metric || null); put("turn", turnNumber(m)); put("token", m.token); put("id", m.facts.id);
  if (url.href !== location.href) history.replaceState(history.state, "", url);
  clearTimeout(m.sending);
  m.sending = tell && !m.playing ? setTimeout(() => { m.sending = null; m.send("at", {id: m.facts.id, metric: m.metric, turn: turnNumber(m), token: m.token}); }, 400) : null;
}
function mark(m) {   /* show which turn is the current one */
  const turns = m.facts.turns, t = turns[m.turn];
  m.slider.value = m.turn; m.slider.setAttribute("aria-valuetext", t ? `Turn ${t.turn + 1} of ${turns.length}, ${t.kind.replaceAll("_", " ")}` : "no turn");
  m.$("[data-is=turn]").textContent = t ? `Turn ${t.turn + 1} of ${turns.length}` : "The completion is empty.";
  m.app.querySelectorAll(".outline button").forEach((b, k) => { k === m.turn ? b.setAttribute("aria-current", "step") : b.removeAttribute("aria-current"); });
  const here = m.$(".outline [aria-current]"), list = m.$(".outline");
  if (here && (here.offsetTop < list.scrollTop || here.offsetTop + here.offsetHeight > list.scrollTop + list.clientHeight)) list.scrollTop = here.offsetTop - list.clientHeight / 2;
  sections(m).forEach((s, k) => { s.toggleAttribute("data-here", k === m.turn); s.toggleAttribute("data-later", !!m.playing && k > m.turn); });
}
function bring(m, target, offset) {   /* scroll this pane alone; blocks get their true height only as they come into view, so repeat it for three frames */
  const put = () => {
    if (!target.isConnected) return;
    m.quietUntil = performance.now() + 300;
    m.pane.scrollTop += target.getBoundingClientRect().top - m.pane.getBoundingClientRect().top - offset;
    ensure(m); frameWindow(m);
  };
  put();
  const mine = ++m.brought;
  let left = 3;
  const again = () => { if (mine === m.brought && left--) { put(); requestAnimationFrame(again); } };
  requestAnimationFrame(again);
}
function goTurn(m, k, tell = true) {
  if (!m.facts.turns.length) return;
  m.turn = Math.max(0, Math.min(m.facts.turns.length - 1, k));
  bring(m, sections(m)[m.turn], 6);
  mark(m); note(m, tell);
}
function goToken(m, i, tell = true) {
  if (!(i >= 0 && i < m.n)) return;
  if (!m.spans[i]) for (const box of m.pane.querySelectorAll("details[data-from]")) if (i >= +box.dataset.from && i < +box.dataset.to) { fill(m, box); box.open = true; }
  build(m, m.blocks.find(b => i >= b.from && i < b.to));
  const e = m.spans[i], fold = e.closest("details");
  if (fold) { fold.open = true; unfolded(m); }
  m.spans[m.token]?.removeAttribute("data-s");
  m.token = i; m.turn = m.turnOf[i];
  e.setAttribute("data-s", "");
  const box = m.pane.getBoundingClientRect(), r = e.getBoundingClientRect();
  if (r.top < box.top + 30 || r.top > box.bottom - 30) bring(m, e, m.pane.clientHeight / 2);
  mark(m); details(m); note(m, tell); jumps(m); frameWindow(m);
}
function goTo(m, {metric, turn, token}) {   /* a position as the address names it */
  const k = m.facts.turns.findIndex(t => t.turn + 1 === turn);
  if (metric && metric !== m.metric) setMetric(m, metric);
  if (token !== null && token >= 0 && token < m.n) goToken(m, token, false); else if (k >= 0) goTurn(m, k, false); else note(m, false);
}
function setMetric(m, name) {
  if (!m.facts.scales[name]) return;
  const begun = performance.now();
  m.metric = m.select.value = name;
  recolor(m); paint(m, begun); note(m);
}

/* ---- jumps ---- */
const around = (list, k, by) => list[(k + by + list.length) % list.length];
const spikesOf = m => m.facts.jumps[m.metric] ?? [];
function jumps(m) {   /* label and enable the buttons */
  const spikes = spikesOf(m), least = m.facts.jumps.least, here = spikes.indexOf(m.token), rank = least.indexOf(m.token);
  m.$("[data-is=spikes]").textContent = spikes.length ? `${here < 0 ? "" : `${here + 1} of `}${plural(spikes.length, "spike")}` : "no spikes";
  m.$("[data-is=least]").textContent = least.length ? `${rank < 0 ? "least likely" : `least likely #${rank + 1}`}` : "no log-probabilities";
  for (const [what, list] of [["spike", spikes], ["least", least]]) for (const s of "+-") m.$(`[data-do="${what}${s}"]`).disabled = !list.length;
}
function goSpike(m, by) {   /* the next spike after the chosen token, or after the top of the screen */
  const list = spikesOf(m);
  if (!list.length) return;
  const from = m.token ?? frameWindow(m) - (by > 0 ? 1 : 0), next = by > 0 ? list.findIndex(i => i > from) : list.findLastIndex(i => i < from);
  goToken(m, list[next < 0 ? (by > 0 ? 0 : list.length - 1) : next]);
}
function goLeast(m, by) {   /* the next least likely token, by rank */
  const least = m.facts.jumps.least, rank = least.indexOf(m.token);
  if (least.length) goToken(m, around(least, rank < 0 && by < 0 ? 0 : rank, by));
}
function nextMetric(m, by) {
  const names = m.facts.metrics.map(x => x.name);
  if (names.length) setMetric(m, around(names, names.indexOf(m.metric), by));
}

/* ---- play ---- */
function play(m, on) {
  stopClock(m);
  if (on) {
    if (m.turn >= m.facts.turns.length - 1) goTurn(m, 0, false);
    m.playing = setInterval(() => { if (m.turn + 1 >= m.facts.turns.length) play(m, false); else goTurn(m, m.turn + 1, false); }, 1200);
  }
  const b = m.$('[data-do="play"]');
  b.textContent = m.playing ? "‖" : "▶"; b.setAttribute("aria-label", m.playing ? "Pause" : "Play");
  mark(m); note(m);
}
function stopClock(m) { clearInterval(m.playing); m.playing = null; }
function stopAll(m) {   /* every timer, when the trajectory changes or the page goes */
  notLater(m.idle); stopClock(m); clearTimeout(m.sending); m.sending = null;
  m.$('[data-do="play"]').textContent = "▶";
}
