/* The frame of the token map, and how text and numbers are written in it. The other tokens*.js files follow in the same module.
   Text of a policy passes through `safe` before it becomes part of a page. */
const CLASSES = 32;   /* colours */
const SIGNS = {"\n": "<i>↵</i>\n", "\t": "<i>⇥</i>\t", "\r": "<i>␍</i>", "\u200c": "\u200c", "\u200d": "\u200d",
               "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;", "\ufffd": "<i>\ufffd</i>"};
const ODD = /[&<>"'\ufffd\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu, RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/;
const safe = text => text.replace(ODD, c => SIGNS[c] ?? (/\p{Cs}/u.test(c) ? "\ufffd" : `<i>⟨${c.codePointAt(0).toString(16).toUpperCase()}⟩</i>`));
const known = v => v !== null && v !== undefined && !Number.isNaN(v);
const number = (v, digits = 3) => known(v) ? (Math.abs(v) >= 1e4 || (v && Math.abs(v) < 10 ** -digits / 2) ? v.toExponential(1) : v.toFixed(digits)).replace("-", "−") : "–";
const signed = v => (v > 0 ? "+" : "") + number(v, 2);
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

const FRAME = `<div class="bar">
 <label>Colour by <select data-do="metric" title="m, M"></select></label>
 <span class="legend" role="img"><span class="low"></span><span class="ramp"></span><span class="high"></span></span>
 <span class="signs"><span class="u">not measured</span><span class="k">control token</span><span class="hatched">not written by the model</span></span>
 <span class="push"><span class="jump" role="group" aria-label="Spikes of this metric"><button data-do="spike-" title="previous spike (p)">‹</button><span data-is="spikes"></span><button data-do="spike+" title="next spike (n)">›</button></span>
 <span class="jump" role="group" aria-label="Least likely tokens"><button data-do="least-" title="likelier (U)">‹</button><span data-is="least"></span><button data-do="least+" title="next least likely token (u)">›</button></span></span>
</div>
<div class="bar turns">
 <button data-do="turn-" title="previous turn (h)" aria-label="Previous turn">‹</button>
 <input type="range" min="0" value="0" step="1" data-do="turn" aria-label="Turn">
 <button data-do="turn+" title="next turn (l)" aria-label="Next turn">›</button>
 <button data-do="play" title="play (k)" aria-label="Play">▶</button><span data-is="turn"></span>
 <span class="push"><button data-do="fold" title="open or fold all tool output (o)">Open tool output</button>
 <button data-do="link" title="copy a link to exactly this view">Copy link</button></span>
</div>
<div class="cols">
 <nav class="outline" aria-label="Turns"></nav>
 <div class="pane" tabindex="0" role="region" aria-label="Tokens; arrow keys move between them"></div>
 <div class="mini" aria-hidden="true"><canvas></canvas><div class="view"></div></div>
 <aside class="card" aria-live="polite"></aside>
</div>
<div class="keys">h l turns · H L trajectories · n p spikes · u U least likely · ← → tokens · m metric · o tool output · k play</div>`;
const KINDS = ["tool_call", "response", "text_pollution", "collapsed"];
const kindChip = t => t.kind ? `<span class="kind${KINDS.indexOf(t.kind)}">${safe(t.kind.replaceAll("_", " "))}</span>` : "";
const BYTES = new TextEncoder();
function bytes(s) {
  if (s.includes("\ufffd")) return "part of a character: the token alone is not valid UTF-8";
  const b = BYTES.encode(s.slice(0, 64)), all = s.length > 64 ? BYTES.encode(s).length : b.length;
  return [...b.slice(0, 16)].map(x => x.toString(16).padStart(2, "0").toUpperCase()).join(" ") + (all > 16 ? ` … (${plural(all, "byte")})` : "");
}
const short = s => safe(s.length > 160 ? s.slice(0, 160) : s) + (s.length > 160 ? `<i>… ${plural(s.length, "character")}</i>` : "") || "<i>∅</i>";
const NOTHING = '<p class="dim">Click a token, or press n for the next spike and u for the least likely token.</p>';
