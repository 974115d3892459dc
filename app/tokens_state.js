/* The state of a token map: one object, `m`, which every function of the other files takes first. */
function newMap(host) {
  const app = document.createElement("div"), style = document.createElement("style");
  app.className = "tm"; app.innerHTML = FRAME;
  host.append(style, app);
  const $ = s => app.querySelector(s);
  return {
    /* elements */
    host, app, style, $, pane: $(".pane"), card: $(".card"), slider: $("input"), select: $("select"), canvas: $("canvas"), view: $(".view"),
    /* the trajectory: facts from the server, columns of the table, and what follows from both */
    facts: null, version: null, n: 0, text: [], id: [], mask: [], column: {}, classes: null, suffix: [], wrote: [], turnOf: [],
    /* what is drawn of it: a span for each token, in blocks that are built when they are needed */
    spans: [], blocks: [], shown: [], perLine: 20, nextBlock: 0, idle: null, drawn: 0,
    /* where the reader is: metric and number of the turn, and the chosen token */
    metric: "", turn: 0, token: null, opened: null,
    /* timers, and the time until which scrolling does not change the turn */
    playing: null, sending: null, scrolling: null, brought: 0, quietUntil: 0,
    send: () => {},
  };
}
const sections = m => m.pane.querySelectorAll("section");
const turnNumber = m => m.facts.turns.length ? m.facts.turns[m.turn].turn + 1 : null;   /* as people count */
