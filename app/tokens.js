/* The token map: outline | tokens | details. Draws one Arrow table and never asks the server; only where the reader stands goes back. */
const CLASSES = 32, BLOCK = 192, LONGEST = 1024;   /* colours; tokens after which a block may end, and must */
const later = window.requestIdleCallback ?? (f => setTimeout(() => f({timeRemaining: () => 8}), 30)), notLater = window.cancelIdleCallback ?? clearTimeout;

function mount(host) {
  const app = document.createElement("div"), style = document.createElement("style");
  app.className = "tm"; app.innerHTML = FRAME;
  host.append(style, app);
  const $ = s => app.querySelector(s), pane = $(".pane"), card = $(".card"), slider = $("input"), select = $("select"), canvas = $("canvas"), view = $(".view");
  let version, opened, facts, n, text, id, mask, column, send, drawn = 0;
  let els, blocks, shown, perLine, next, idle = null, wrote, suffix, turnOf, at, spot, spikeAt, leastAt, quiet = 0, brought = 0, timer, clock, pending;

  /* ---- from a table to spans ---- */
  const NAMES = Array.from({length: CLASSES + 1}, (_, k) => k ? `c${k - 1}` : "u");
  const span = i => `<span class="${mask[i] ? (app.now ? NAMES[app.now[i] + 1] : "") : "o"}${suffix[i]}">${safe(text[i]) || "<i>∅</i>"}</span>`;
  function lines(from, to) {   /* blocks that end where a line ends; each is empty, and as tall as it will probably be, until `build` */
    let out = "", start = from, size = 0, tall = 0;
    for (let i = from; i < to; i++) {
      size++; tall += text[i].length / perLine + text[i].includes("\n") / 2;
      if (i + 1 === to || (size >= BLOCK && text[i].endsWith("\n")) || size >= LONGEST || (size > 1 && text[i].length > 4e4)) {
        const px = Math.ceil(tall) * 22;
        out += `<div class="b" data-i="${start}" data-to="${i + 1}" style="min-height:${px}px;contain-intrinsic-size:auto ${px}px"></div>`;
        start = i + 1; size = tall = 0;
      }
    }
    return out;
  }
  function collect(root) {
    for (const el of root.querySelectorAll(".b")) blocks.push({el, from: +el.dataset.i, to: +el.dataset.to, fold: el.closest("details"), built: false});
    blocks.sort((a, b) => a.from - b.from);
    unfolded();
  }
  const unfolded = () => { shown = blocks.filter(b => !b.fold || b.fold.open); };
  function build(b) {
    if (b.built) return;
    let html = "", i = b.from;
    for (let j = b.from; j < b.to; j++) html += span(j);
    b.el.innerHTML = html; b.el.style.minHeight = ""; b.built = true;
    for (const e of b.el.children) { els[i] = e; e.at = i++; }
  }
  function ensure() {   /* what is on the screen, and half a screen around it, is there */
    const box = pane.getBoundingClientRect(), around = box.height / 2;
    for (let round = 0; round < 5; round++) {
      const wanted = [];
      for (let k = blockAt(box.top - around); k < shown.length && shown[k].el.getBoundingClientRect().top < box.bottom + around; k++) if (!shown[k].built) wanted.push(shown[k]);
      if (!wanted.length) return;
      wanted.forEach(build);
    }
  }
  function rest(time) {   /* all else follows when there is nothing better to do, so that it can be searched */
    for (let k = 0; k < 4 || time.timeRemaining() > 4; k++) {
      while (next < blocks.length && blocks[next].built) next++;
      if (next >= blocks.length) { app.dataset.whole = 1; idle = null; return; }
      build(blocks[next]);
    }
    idle = later(rest, {timeout: 300});
  }
  function restLater() { delete app.dataset.whole; next = 0; notLater(idle); idle = later(rest, {timeout: 1000}); }
  function fill(box) {   /* tool output, the first time it is opened */
    const inner = box.lastElementChild;
    if (box.full) return;
    box.full = true;
    if (box.dataset.from === undefined) inner.innerHTML = safe(facts.prompt);
    else { inner.innerHTML = lines(+box.dataset.from, +box.dataset.to); collect(inner); ensure(); restLater(); }
  }
  function toolPart(from, to, error) {
    let first = "";
    for (let i = from; i < to && first.length < 600; i++) first += text[i].slice(0, 600);
    first = first.replace(/<\|[^<>|]{1,40}\|>|<\/?tool_response>/g, " ").replace(/^\s*(?:user|tool|ipython|environment)\s*\n/, " ").trim().split("\n")[0].slice(0, 140);
    return `<details class="tool${error ? " err" : ""}" data-from="${from}" data-to="${to}"><summary><b>${error ? "✖ error" : "tool"}</b><span class="first">${safe(first)}</span>` +
           `<span class="dim">${plural(to - from, facts.unit)}</span></summary><div class="text hatched"></div></details>`;
  }
  function turnHtml(t, k) {
    const parts = t.parts.map(([a, b, own], p) => own ? `<div class="text">${lines(a, b)}</div>` : toolPart(a, b, t.errors.includes(p)));
    const numbers = [["reward", t.reward], ["advantage", t.advantage]].filter(x => known(x[1])).map(([name, v]) => `<span>${name} <b>${signed(v)}</b></span>`);
    const kl = Object.entries(t.kl).map(([name, v]) => `<span title="KL from the recorded policy to ${safe(name)}, estimated from the tokens of this turn (k3), nats">KL ${safe(name)} <b>${number(v)}</b></span>`);
    return `<section data-k="${k}" aria-label="Turn ${t.turn + 1}"><header><b>Turn ${t.turn + 1}</b>${kindChip(t)}<span class="dim">${plural(t.tokens, facts.unit)}</span>` +
           `<span class="numbers">${numbers.join("")}${kl.join("")}</span></header>${parts.join("")}</section>`;
  }
  function outlineHtml(t, k) {
    const failed = t.errors.length ? `<span class="bad" title="a tool answered with an error">✖</span>` : "";
    return `<button data-do="go" data-k="${k}"><span class="no">${t.turn + 1}</span>${kindChip(t)}${failed}<span class="adv" title="reward of the turn">${known(t.reward) && t.reward ? signed(t.reward) : ""}</span></button>`;
  }

  /* ---- colours ---- */
  function classes(metric) {
    const {low, high} = facts.scales[metric], out = new Int8Array(n), v = column[metric];
    for (let i = 0; i < n; i++) out[i] = Number.isNaN(v[i]) ? -1 : Math.min(CLASSES - 1, Math.floor(Math.min(1, Math.max(0, (v[i] - low) / (high - low))) * CLASSES));
    return out;
  }
  function paint(begun, swap) {
    const scale = facts.scales[at.metric];
    if (swap) { app.now = classes(at.metric); for (const i of wrote) if (els[i]) els[i].className = NAMES[app.now[i] + 1] + suffix[i]; }
    style.textContent = (scale?.colors ?? []).map((color, k) => `.tm .c${k}{background:${color}}`).join("");
    legend(scale); minimap(); jumps();
    if (spot !== null) details();
    painted(begun);
  }
  function painted(begun) {   /* after the frame that shows it */
    const metric = at.metric, mine = ++drawn, shown = facts.id;
    requestAnimationFrame(() => setTimeout(() => { Object.assign(app.dataset, {painted: mine, metric, id: shown, ms: Math.round(performance.now() - begun)}); }));
  }
  function legend(scale) {
    const box = $(".legend");
    box.hidden = $(".signs").hidden = !scale;
    select.hidden = !scale; select.parentNode.firstChild.textContent = scale ? "Colour by " : `No number was stored for the ${facts.unit}s of this trajectory. `;
    if (!scale) return;
    const step = 100 / CLASSES, ends = [`${scale.low}` + (scale.low === scale.plain ? "" : " or less"), `${+scale.high.toFixed(2)}` + (scale.high === scale.plain || scale.bounded ? "" : " or more")].map(s => s.replace("-", "−"));
    $(".low").textContent = ends[0]; $(".high").textContent = ends[1];
    $(".ramp").style.backgroundImage = `linear-gradient(to right,${scale.colors.map((c, k) => `${c} ${k * step}% ${(k + 1) * step}%`).join(",")})`;
    box.setAttribute("aria-label", `${scale.label}: from ${ends[0]} to ${ends[1]}`); box.title = scale.label;
  }
  function minimap() {
    const box = canvas.parentNode, ratio = devicePixelRatio || 1, w = box.clientWidth, h = box.clientHeight;
    canvas.width = w * ratio; canvas.height = h * ratio;
    const g = canvas.getContext("2d"), scale = facts.scales[at.metric], c = app.now;
    g.scale(ratio, ratio);
    if (!n || !h) return;
    const rows = Math.min(h, n), tall = h / rows, strength = scale ? scale.strength : [], middle = scale ? (scale.plain - scale.low) / (scale.high - scale.low) * (CLASSES - 1) : 0;
    for (let y = 0; y < rows; y++) {
      let power = 0, sum = 0, own = 0, seen = 0, best = -1;   /* as strong as they are on average (root mean square), on the side where most of it lies */
      const from = Math.round(y * tall), size = Math.round((y + 1) * tall) - from, a = Math.floor(y * n / rows), b = Math.max(a + 1, Math.floor((y + 1) * n / rows));
      for (let i = a; i < b; i++) { own += mask[i]; if (c && c[i] >= 0) { const s = strength[c[i]]; seen++; power += s * s; sum += c[i] < middle ? -s : s; } }
      if (power > 0) { const s = Math.sqrt(power / seen); best = sum < 0 ? strength.findLastIndex((x, k) => k < middle && x >= s - 1e-9) : strength.findIndex((x, k) => k >= middle && x >= s - 1e-9); }
      if (!own) { g.fillStyle = "rgba(128,135,146,.34)"; g.fillRect(0, from, w - 5, size); }
      else if (best >= 0) { g.fillStyle = scale.colors[best]; g.fillRect(0, from, w - 5, size); g.fillRect(0, from, w - 5, size); }
    }
    g.fillStyle = "rgba(128,135,146,.75)";
    for (const t of facts.turns) if (t.parts.length && t.parts[0][0]) g.fillRect(0, t.parts[0][0] / n * h, w, 1);
    g.fillStyle = getComputedStyle(app).getPropertyValue("color");
    for (const i of facts.jumps[at.metric] ?? []) g.fillRect(w - 4, (i + .5) / n * h - 1, 4, 2);
    window_();
  }
  function blockAt(y) {
    let a = 0, b = shown.length - 1;
    while (a < b) { const m = (a + b + 1) >> 1; shown[m].el.getBoundingClientRect().top <= y ? a = m : b = m - 1; }
    return a;
  }
  const placeOf = y => {   /* which token lies at a height of the window */
    if (!shown.length) return 0;
    const {el, from, to} = shown[blockAt(y)], box = el.getBoundingClientRect();
    return from + Math.round((to - from) * Math.min(1, Math.max(0, (y - box.top) / (box.height || 1))));
  };
  function window_() {
    const box = pane.getBoundingClientRect(), h = canvas.parentNode.clientHeight, a = placeOf(box.top), b = placeOf(box.bottom);
    view.style.top = `${a / n * h}px`; view.style.height = `${Math.max(6, (b - a) / n * h)}px`;
    return a;
  }

  /* ---- moving about ---- */
  function note(tell = true) {   /* the address of the page is where the reader stands */
    const url = new URL(location), put = (k, v) => v === null ? url.searchParams.delete(k) : url.searchParams.set(k, v);
    put("metric", at.metric || null); put("turn", facts.turns.length ? facts.turns[at.k].turn + 1 : null); put("token", spot);
    url.searchParams.set("id", facts.id);
    if (url.href !== location.href) history.replaceState(history.state, "", url);
    clearTimeout(pending);
    pending = null;
    if (tell && !clock) pending = setTimeout(() => { pending = null; send("at", {id: facts.id, metric: at.metric, turn: facts.turns.length ? facts.turns[at.k].turn + 1 : null, token: spot}); }, 400);
  }
  const sections = () => pane.querySelectorAll("section");
  function mark() {
    const t = facts.turns[at.k];
    slider.value = at.k; slider.setAttribute("aria-valuetext", t ? `Turn ${t.turn + 1} of ${facts.turns.length}, ${t.kind.replaceAll("_", " ")}` : "no turn");
    $("[data-is=turn]").textContent = t ? `Turn ${t.turn + 1} of ${facts.turns.length}` : "The completion is empty.";
    app.querySelectorAll(".outline button").forEach((b, k) => { k === at.k ? b.setAttribute("aria-current", "step") : b.removeAttribute("aria-current"); });
    const here = app.querySelector(".outline [aria-current]"), list = $(".outline");
    if (here && (here.offsetTop < list.scrollTop || here.offsetTop + here.offsetHeight > list.scrollTop + list.clientHeight)) list.scrollTop = here.offsetTop - list.clientHeight / 2;
    sections().forEach((s, k) => { s.toggleAttribute("data-here", k === at.k); s.toggleAttribute("data-later", !!clock && k > at.k); });
  }
  function bring(target, offset) {   /* scroll this pane alone; blocks get their true height only as they come into view, so look again */
    const put = () => { if (!target.isConnected) return; quiet = performance.now() + 300; pane.scrollTop += target.getBoundingClientRect().top - pane.getBoundingClientRect().top - offset; ensure(); window_(); };
    put(); const mine = ++brought; let left = 3;
    const again = () => { if (mine === brought && left--) { put(); requestAnimationFrame(again); } };
    requestAnimationFrame(again);
  }
  function goTurn(k, tell = true) {
    if (!facts.turns.length) return;
    at.k = Math.max(0, Math.min(facts.turns.length - 1, k));
    bring(sections()[at.k], 6);
    mark(); note(tell);
  }
  function goToken(i, tell = true) {
    if (!(i >= 0 && i < n)) return;
    if (!els[i]) for (const box of pane.querySelectorAll("details[data-from]")) if (i >= +box.dataset.from && i < +box.dataset.to) { fill(box); box.open = true; }
    build(blocks.find(b => i >= b.from && i < b.to));
    const e = els[i];
    const fold = e.closest("details");
    if (fold) { fold.open = true; unfolded(); }
    els[spot]?.removeAttribute("data-s");
    spot = i; at.k = turnOf[i];
    e.setAttribute("data-s", "");
    const box = pane.getBoundingClientRect(), r = e.getBoundingClientRect();
    if (r.top < box.top + 30 || r.top > box.bottom - 30) bring(e, pane.clientHeight / 2);
    mark(); details(); note(tell); jumps(); window_();
  }
  function step(list, place, by) { return list.length ? (place + by + list.length) % list.length : null; }
  function jumps() {
    const list = facts.jumps[at.metric] ?? [], least = facts.jumps.least, here = list.indexOf(spot);
    spikeAt = here; leastAt = least.indexOf(spot);
    $("[data-is=spikes]").textContent = list.length ? `${here < 0 ? "" : `${here + 1} of `}${plural(list.length, "spike")}` : "no spikes";
    $("[data-is=least]").textContent = least.length ? `${leastAt < 0 ? "least likely" : `least likely #${leastAt + 1}`}` : "no log-probabilities";
    for (const [what, l] of [["spike", list], ["least", least]]) for (const s of "+-") $(`[data-do="${what}${s}"]`).disabled = !l.length;
  }
  function spike(by) {   /* the next one after where the reader stands */
    const list = facts.jumps[at.metric] ?? [];
    if (!list.length) return;
    const from = spot ?? window_() - (by > 0 ? 1 : 0), next = by > 0 ? list.findIndex(i => i > from) : list.findLastIndex(i => i < from);
    goToken(list[next < 0 ? (by > 0 ? 0 : list.length - 1) : next]);
  }
  function least(by) { const k = step(facts.jumps.least, leastAt < 0 && by < 0 ? 0 : leastAt, by); if (k !== null) goToken(facts.jumps.least[k]); }
  function play(on) {
    clearInterval(clock); clock = null;
    if (on) { if (at.k >= facts.turns.length - 1) goTurn(0, false); clock = setInterval(() => { if (at.k + 1 >= facts.turns.length) play(false); else goTurn(at.k + 1, false); }, 1200); }
    const b = $('[data-do="play"]');
    b.textContent = clock ? "‖" : "▶"; b.setAttribute("aria-label", clock ? "Pause" : "Play");
    mark(); note();
  }
  function setMetric(name) { if (!facts.scales[name]) return; const begun = performance.now(); at.metric = select.value = name; paint(begun, true); note(); }
  function fold() {
    const boxes = [...pane.querySelectorAll("details[data-from]")], open = boxes.some(b => !b.open);
    const s = sections()[at.k], top = s?.getBoundingClientRect().top;
    for (const b of boxes) { if (open) fill(b); b.open = open; }
    unfolded();
    if (s) { quiet = performance.now() + 300; pane.scrollTop += s.getBoundingClientRect().top - top; }
    $('[data-do="fold"]').textContent = open ? "Fold tool output" : "Open tool output";
  }

  /* ---- the card of a token ---- */
  function details() {
    const i = spot, t = facts.turns[turnOf[i]], around = [];
    const rows = facts.metrics.map(m => [m, column[m.name][i]]).filter(([, v]) => known(v)).map(([m, v]) => {
      const s = facts.scales[m.name], k = Math.min(CLASSES - 1, Math.floor(Math.min(1, Math.max(0, (v - s.low) / (s.high - s.low))) * CLASSES));
      return `<tr${m.name === at.metric ? ' class="on"' : ""}><th>${safe(m.label)}</th><td><span class="dot" style="background:${s.colors[k]}"></span>${number(v, 4)}` +
             (m.name.endsWith("logprob") ? ` <span class="dim">p ${number(Math.exp(v))}</span>` : "") + "</td></tr>"; });
    for (let j = Math.max(0, i - 6); j < Math.min(n, i + 7); j++)
      around.push(`<button data-do="token" data-i="${j}"${j === i ? ' aria-current="true"' : ""}><span class="piece">${short(text[j].slice(0, 40))}</span>` +
                  `<span class="dim">${app.now && app.now[j] >= 0 ? number(column[at.metric][j]) : mask[j] ? "" : "tool"}</span></button>`);
    const metric = facts.metrics.find(m => m.name === at.metric);
    card.innerHTML = `<div class="big${suffix[i].includes("r") ? " r" : ""}">${short(text[i])}</div><table><tr><th>${facts.unit[0].toUpperCase() + facts.unit.slice(1)}</th><td>${(i + 1).toLocaleString("en")} of ${n.toLocaleString("en")}, turn ${t.turn + 1}</td></tr>` +
      `${id[i] < 0 ? "" : `<tr><th>Id</th><td>${id[i]}</td></tr>`}<tr><th>Bytes</th><td class="mono">${bytes(text[i])}</td></tr>${rows.join("")}</table>` +
      (mask[i] ? (rows.length ? "" : '<p class="dim">Nothing was measured here.</p>') : '<p class="dim">Not written by the model: it carries no gradient.</p>') +
      `<h4>Neighbours${metric ? `: ${safe(metric.label)}` : ""}</h4><div class="near">${around.join("")}</div>`;
  }

  /* ---- one handler for all ---- */
  const DO = {"turn-": () => goTurn(at.k - 1), "turn+": () => goTurn(at.k + 1), "spike-": () => spike(-1), "spike+": () => spike(1), "least-": () => least(-1), "least+": () => least(1),
              play: () => play(!clock), fold, link: async b => { await navigator.clipboard.writeText(location.href); b.textContent = "Copied"; setTimeout(() => { b.textContent = "Copy link"; }, 1500); }};
  app.addEventListener("click", ev => {
    const b = ev.target.closest("[data-do]"), kind = b?.dataset.do;
    if (kind === "go") goTurn(+b.dataset.k);
    else if (kind === "token") goToken(+b.dataset.i);
    else if (DO[kind]) DO[kind](b);
    else { const e = ev.target.closest(".b > span"); if (e && getSelection().isCollapsed !== false) goToken(e.at); }
  });
  app.addEventListener("toggle", ev => { if (ev.target.open) fill(ev.target); unfolded(); ensure(); window_(); }, true);
  select.addEventListener("change", () => setMetric(select.value));
  slider.addEventListener("input", () => goTurn(+slider.value));
  pane.addEventListener("scroll", () => {
    if (timer) return;
    timer = requestAnimationFrame(() => {
      timer = null;
      if (!n) return;
      ensure();
      const k = turnOf[Math.min(n - 1, window_())];
      if (performance.now() > quiet && k !== at.k) { at.k = k; mark(); note(false); }
    });
  }, {passive: true});
  pane.addEventListener("mousemove", ev => {
    const e = ev.target.closest(".b > span");
    if (!e || e.title) return;
    const i = e.at, v = at.metric ? column[at.metric][i] : NaN;
    e.title = `${id[i] < 0 ? "" : `id ${id[i]}, `}${facts.unit} ${i + 1}` + (known(v) ? `, ${number(v, 4)}` : mask[i] ? "" : ", not written by the model");
    e.addEventListener("mouseleave", () => e.removeAttribute("title"), {once: true});
  });
  const drag = ev => { if (!ev.buttons || !n) return;
    const box = canvas.getBoundingClientRect(), i = Math.max(0, Math.min(n - 1, Math.floor((ev.clientY - box.top) / box.height * n)));
    const b = shown.findLast(x => x.from <= i) ?? shown[0], r = b.el.getBoundingClientRect();
    pane.scrollTop += r.top + r.height * Math.min(1, (i - b.from) / (b.to - b.from)) - pane.getBoundingClientRect().top - pane.clientHeight / 2; };
  $(".mini").addEventListener("pointerdown", ev => { ev.currentTarget.setPointerCapture(ev.pointerId); drag(ev); });
  $(".mini").addEventListener("pointermove", drag);
  const metricBy = by => { const names = facts.metrics.map(m => m.name); if (names.length) setMetric(names[step(names, names.indexOf(at.metric), by)]); };
  const KEYS = {h: DO["turn-"], l: DO["turn+"], n: DO["spike+"], p: DO["spike-"], u: DO["least+"], U: DO["least-"], k: DO.play, o: fold, m: () => metricBy(1), M: () => metricBy(-1)};
  function keys(ev) {
    const target = ev.composedPath()[0], tag = target.tagName;
    if (ev.ctrlKey || ev.metaKey || ev.altKey || !facts || !host.host?.isConnected) return;
    if (tag === "TEXTAREA" || tag === "SELECT" || target.isContentEditable || (tag === "INPUT" && target.type !== "range") || document.querySelector("[role=dialog]")) return;
    const arrow = {ArrowRight: 1, ArrowLeft: -1}[ev.key];
    if (arrow && target === pane) { goToken(spot === null ? window_() : spot + arrow); ev.preventDefault(); }
    else if (KEYS[ev.key]) { KEYS[ev.key](); ev.preventDefault(); }
  }
  new ResizeObserver(() => { if (facts) minimap(); }).observe(canvas.parentNode);

  /* ---- a trajectory arrives ---- */
  function show(data) {
    const begun = performance.now(), table = data.tokens;
    const asked = pending ? at.metric : data.facts.at.metric;   /* a choice the server does not know yet goes first */
    play_stop();
    ({facts} = data); opened = JSON.stringify(facts.at); version = facts.version; n = table.numRows;
    const get = name => table.getChild(name);
    text = new Array(n);
    const pieces = get("text");
    for (let i = 0; i < n; i++) text[i] = pieces.get(i) ?? "";
    id = get("id").toArray(); mask = get("mask").toArray();
    column = Object.fromEntries(facts.metrics.map(m => [m.name, get(m.name).toArray()]));
    els = new Array(n); blocks = []; perLine = Math.max(20, (pane.clientWidth - 60) / 7.8); wrote = []; spot = null; turnOf = new Int32Array(n);
    const control = new Set(facts.control);
    suffix = text.map(s => (control.has(s) ? " k" : "") + (RIGHT_TO_LEFT.test(s) ? " r" : ""));
    for (let i = 0; i < n; i++) if (mask[i]) wrote.push(i);
    facts.turns.forEach((t, k) => t.parts.forEach(([a, b]) => turnOf.fill(k, a, b)));
    at = {metric: facts.scales[asked] ? asked : facts.scales[at?.metric] ? at.metric : facts.metrics[0]?.name ?? "", k: 0};
    app.now = at.metric ? classes(at.metric) : null;
    select.replaceChildren(...Object.entries(Object.groupBy(facts.metrics, m => m.group)).map(([label, ms]) => {
      const g = document.createElement("optgroup"); g.label = label; g.append(...ms.map(m => new Option(m.label, m.name))); return g; }));
    select.value = at.metric;
    slider.max = Math.max(0, facts.turns.length - 1);
    $(".outline").innerHTML = facts.turns.map(outlineHtml).join("");
    card.innerHTML = NOTHING;
    const prompt = facts.prompt ? `<details class="prompt"><summary><b>Prompt</b><span class="dim">${plural(facts.prompt_tokens, facts.unit)}</span></summary><div class="text hatched"></div></details>` : "";
    pane.innerHTML = prompt + (facts.turns.map(turnHtml).join("") || '<p class="dim">The completion is empty.</p>');
    pane.scrollTop = 0; collect(pane); ensure(); restLater();
    $('[data-do="fold"]').textContent = "Open tool output"; $('[data-do="fold"]').hidden = !pane.querySelector("details[data-from]");
    paint(begun, false); mark();
    standAt(facts.at);
    app.dataset.built = Math.round(performance.now() - begun);
  }
  function standAt({metric, turn, token}) {
    const k = facts.turns.findIndex(t => t.turn + 1 === turn);
    if (metric && metric !== at.metric) setMetric(metric);
    if (token !== null && token >= 0 && token < n) goToken(token, false); else if (k >= 0) goTurn(k, false); else note(false);
  }
  const play_stop = () => { notLater(idle); clearInterval(clock); clock = null; clearTimeout(pending); pending = null; const b = $('[data-do="play"]'); b.textContent = "▶"; };
  return {
    update(data, tell) { send = tell; addEventListener("keydown", keys); 
      if (data.facts.version !== version) show(data);
      else if (JSON.stringify(data.facts.at) !== opened) { opened = JSON.stringify(data.facts.at); standAt(data.facts.at); }   /* another address, the same trajectory */
      else note(false); },
    stop() { removeEventListener("keydown", keys); if (facts) play_stop(); },
  };
}

export default function ({data, parentElement, setStateValue}) {
  const it = parentElement.tokenMap ??= mount(parentElement);
  it.update(data, setStateValue);
  return () => it.stop();
}
