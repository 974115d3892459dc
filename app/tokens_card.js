/* The card of the chosen token: its text, bytes and metrics, and its neighbours. */
function metricRow(m, metric, v) {
  const scale = m.facts.scales[metric.name], p = metric.name.endsWith("logprob") ? ` <span class="dim">p ${number(Math.exp(v))}</span>` : "";
  return `<tr${metric.name === m.metric ? ' class="on"' : ""}><th>${safe(metric.label)}</th><td><span class="dot" style="background:${scale.colors[place(scale, v)]}"></span>${number(v, 4)}${p}</td></tr>`;
}
function neighbour(m, j) {
  const value = m.classes && m.classes[j] >= 0 ? number(m.column[m.metric][j]) : m.mask[j] ? "" : "tool";
  return `<button data-do="token" data-i="${j}"${j === m.token ? ' aria-current="true"' : ""}><span class="piece">${short(m.text[j].slice(0, 40))}</span><span class="dim">${value}</span></button>`;
}
function details(m) {
  const i = m.token, {facts} = m, unit = facts.unit[0].toUpperCase() + facts.unit.slice(1), near = [];
  const rows = facts.metrics.filter(x => known(m.column[x.name][i])).map(x => metricRow(m, x, m.column[x.name][i])), metric = facts.metrics.find(x => x.name === m.metric);
  for (let j = Math.max(0, i - 6); j < Math.min(m.n, i + 7); j++) near.push(neighbour(m, j));
  const remark = !m.mask[i] ? "Not written by the model: it has no gradient." : rows.length ? "" : "Nothing was measured here.";
  m.card.innerHTML = `<div class="big${m.suffix[i].includes("r") ? " r" : ""}">${short(m.text[i])}</div>` +
    `<table><tr><th>${unit}</th><td>${(i + 1).toLocaleString("en")} of ${m.n.toLocaleString("en")}, turn ${facts.turns[m.turnOf[i]].turn + 1}</td></tr>` +
    `${m.id[i] < 0 ? "" : `<tr><th>Id</th><td>${m.id[i]}</td></tr>`}<tr><th>Bytes</th><td class="mono">${bytes(m.text[i])}</td></tr>${rows.join("")}</table>` +
    `${remark ? `<p class="dim">${remark}</p>` : ""}<h4>Neighbours${metric ? `: ${safe(metric.label)}` : ""}</h4><div class="near">${near.join("")}</div>`;
}
function tip(m, e) {   /* the number of a token, while the mouse is over it */
  const i = e.at, v = m.metric ? m.column[m.metric][i] : NaN;
  e.title = `${m.id[i] < 0 ? "" : `id ${m.id[i]}, `}${m.facts.unit} ${i + 1}` + (known(v) ? `, ${number(v, 4)}` : m.mask[i] ? "" : ", not written by the model");
  e.addEventListener("mouseleave", () => e.removeAttribute("title"), {once: true});
}
