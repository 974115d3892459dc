/* Colours of the token map: the class of each token, the legend, and the minimap. */
function place(scale, v) {   /* colour class of a value */
  return Math.min(CLASSES - 1, Math.floor(Math.min(1, Math.max(0, (v - scale.low) / (scale.high - scale.low))) * CLASSES));
}
function classesOf(m) {   /* of each token under the metric chosen, -1 where it was not measured; null where there is no metric */
  if (!m.metric) return null;
  const scale = m.facts.scales[m.metric], out = new Int8Array(m.n), v = m.column[m.metric];
  for (let i = 0; i < m.n; i++) out[i] = Number.isNaN(v[i]) ? -1 : place(scale, v[i]);
  return out;
}
function recolor(m) {
  m.classes = classesOf(m);
  for (const i of m.wrote) if (m.spans[i]) m.spans[i].className = NAMES[m.classes[i] + 1] + m.suffix[i];
}
function paint(m, begun) {
  const scale = m.facts.scales[m.metric];
  m.style.textContent = (scale?.colors ?? []).map((color, k) => `.tm .c${k}{background:${color}}`).join("");
  legend(m, scale); minimap(m); jumps(m);
  if (m.token !== null) details(m);
  painted(m, begun);
}
function painted(m, begun) {   /* test hook: what is on the screen, and how long it took, after the frame that shows it */
  const metric = m.metric, mine = ++m.drawn, id = m.facts.id;
  requestAnimationFrame(() => setTimeout(() => { Object.assign(m.app.dataset, {painted: mine, metric, id, ms: Math.round(performance.now() - begun)}); }));
}
function legend(m, scale) {
  const box = m.$(".legend");
  box.hidden = m.$(".signs").hidden = m.select.hidden = !scale;
  m.select.parentNode.firstChild.textContent = scale ? "Colour by " : `No metric was measured for the ${m.facts.unit}s of this trajectory. `;
  if (!scale) return;
  const low = `${scale.low}` + (scale.low === scale.plain ? "" : " or less"), high = `${+scale.high.toFixed(2)}` + (scale.high === scale.plain || scale.bounded ? "" : " or more");
  const step = 100 / CLASSES, ends = [low, high].map(s => s.replace("-", "−"));
  m.$(".low").textContent = ends[0]; m.$(".high").textContent = ends[1];
  m.$(".ramp").style.backgroundImage = `linear-gradient(to right,${scale.colors.map((c, k) => `${c} ${k * step}% ${(k + 1) * step}%`).join(",")})`;
  box.setAttribute("aria-label", `${scale.label}: from ${ends[0]} to ${ends[1]}`); box.title = scale.label;
}

/* ---- the minimap: all tokens in a strip ---- */
function minimap(m) {
  const box = m.canvas.parentNode, ratio = devicePixelRatio || 1, w = box.clientWidth, h = box.clientHeight;
  m.canvas.width = w * ratio; m.canvas.height = h * ratio;
  const g = m.canvas.getContext("2d");
  g.scale(ratio, ratio);
  if (!m.n || !h) return;
  minimapTokens(m, g, w, h);
  g.fillStyle = "rgba(128,135,146,.75)";
  for (const t of m.facts.turns) if (t.parts.length && t.parts[0][0]) g.fillRect(0, t.parts[0][0] / m.n * h, w, 1);
  g.fillStyle = getComputedStyle(m.app).getPropertyValue("color");
  for (const i of m.facts.jumps[m.metric] ?? []) g.fillRect(w - 4, (i + .5) / m.n * h - 1, 4, 2);
  frameWindow(m);
}
function minimapTokens(m, g, w, h) {   /* a row of pixels stands for several tokens: as strong as they are on average (root mean square), on the side where most of it lies */
  const scale = m.facts.scales[m.metric], strength = scale ? scale.strength : [], middle = scale ? (scale.plain - scale.low) / (scale.high - scale.low) * (CLASSES - 1) : 0;
  const rows = Math.min(h, m.n), tall = h / rows, c = m.classes;
  for (let y = 0; y < rows; y++) {
    let power = 0, sum = 0, wrote = 0, seen = 0, best = -1;
    const from = Math.round(y * tall), size = Math.round((y + 1) * tall) - from, a = Math.floor(y * m.n / rows), b = Math.max(a + 1, Math.floor((y + 1) * m.n / rows));
    for (let i = a; i < b; i++) { wrote += m.mask[i]; if (c && c[i] >= 0) { const s = strength[c[i]]; seen++; power += s * s; sum += c[i] < middle ? -s : s; } }
    if (power > 0) {
      const s = Math.sqrt(power / seen) - 1e-9;
      best = sum < 0 ? strength.findLastIndex((x, k) => k < middle && x >= s) : strength.findIndex((x, k) => k >= middle && x >= s);
    }
    if (!wrote) { g.fillStyle = "rgba(128,135,146,.34)"; g.fillRect(0, from, w - 5, size); }
    else if (best >= 0) { g.fillStyle = scale.colors[best]; g.fillRect(0, from, w - 5, size); g.fillRect(0, from, w - 5, size); }
  }
}
function tokenAt(m, y) {   /* which token lies at a height of the window */
  if (!m.shown.length) return 0;
  const {el, from, to} = m.shown[blockAt(m, y)], box = el.getBoundingClientRect();
  return from + Math.round((to - from) * Math.min(1, Math.max(0, (y - box.top) / (box.height || 1))));
}
function frameWindow(m) {   /* frame the tokens on the screen; return the first of them */
  const box = m.pane.getBoundingClientRect(), h = m.canvas.parentNode.clientHeight, a = tokenAt(m, box.top), b = tokenAt(m, box.bottom);
  m.view.style.top = `${a / m.n * h}px`; m.view.style.height = `${Math.max(6, (b - a) / m.n * h)}px`;
  return a;
}
function dragWindow(m, ev) {
  if (!ev.buttons || !m.n) return;
  const box = m.canvas.getBoundingClientRect(), i = Math.max(0, Math.min(m.n - 1, Math.floor((ev.clientY - box.top) / box.height * m.n)));
  const b = m.shown.findLast(x => x.from <= i) ?? m.shown[0], r = b.el.getBoundingClientRect();
  m.pane.scrollTop += r.top + r.height * Math.min(1, (i - b.from) / (b.to - b.from)) - m.pane.getBoundingClientRect().top - m.pane.clientHeight / 2;
}
