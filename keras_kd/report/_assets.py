"""What does the page of a comparison bring with it? Its style and its script."""

STYLE = """
:root { --c0: #3a6fb0; --c1: #b5482f; --c2: #2e7d5b; --c3: #8a5aa8; --c4: #8f6b00; --c5: #b03a78; --c6: #1f7a8c; --c7: #5f6672; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #7fb0ee; --c1: #f09478; --c2: #72cba3; --c3: #c79ae6; --c4: #e0bd55; --c5: #f08bbd; --c6: #6fcbdc; --c7: #b4bcc8; }
}
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
.soft { color: var(--soft); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; max-width: max-content; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.45rem 0.7rem; text-align: right; white-space: nowrap; font-weight: normal;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
tbody tr:hover > * { background: var(--shade); }
th[scope="row"], .text { text-align: left; }
thead th { background: var(--shade); font-weight: 600; }
th[scope="row"] { position: sticky; left: 0; background: var(--page); max-width: 16rem; overflow: hidden; text-overflow: ellipsis; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th button::after { content: "\\2195" / ""; opacity: 0.35; margin-left: 0.3em; }
th[aria-sort="ascending"] button::after { content: "\\2191" / ""; opacity: 1; }
th[aria-sort="descending"] button::after { content: "\\2193" / ""; opacity: 1; }
.swatch { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 50%; background: currentColor; margin-right: 0.5em; }
.chart { display: block; width: 100%; max-width: 540px; height: auto; font-size: 12px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; max-width: 80rem; }
.chart text { fill: var(--soft); }
.chart .name { fill: var(--text); }
.chart .end { text-anchor: end; }
.chart .middle { text-anchor: middle; }
.chart .axis { fill: none; stroke: var(--soft); }
.chart .grid { stroke: var(--line); stroke-width: 0.7; }
.chart circle { fill: currentColor; fill-opacity: 0.55; stroke: currentColor; }
.chart polyline { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.chart .dashed { stroke-dasharray: 5 4; stroke-width: 1.3; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; }
.bar { display: inline-block; width: 6rem; height: 0.6em; border-radius: 3px; background: var(--line); margin-right: 0.6em; }
.bar > span { display: block; height: 100%; border-radius: 3px; background: currentColor; }
td.zeros { text-align: left; }
details { margin: 0.4rem 0; }
summary { cursor: pointer; padding: 0.3rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1.2rem; max-width: 60rem; }
dt { font-weight: 600; } dd { margin: 0; }
#tip { position: fixed; z-index: 9; max-width: min(20rem, 90vw); padding: 0.4rem 0.7rem; border-radius: 6px; font-size: 0.85rem;
  background: var(--text); color: var(--page); pointer-events: none; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { font-size: 15px; padding-top: 0.5rem; }
  th[scope="row"] { max-width: 9rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 0.6rem; }
}
@media print { .scroll { overflow: visible; } }
"""

SCRIPT = """
"use strict";
const table = document.getElementById("models"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
function order(column, descending) {
  const head = heads[column], text = head.classList.contains("text");
  const rows = [...body.rows].map((row) => [row.cells[column].dataset.value, row]);
  rows.sort(([a], [b]) => {
    if (a === "" || b === "") return (a === "") - (b === "");  // what is not known comes last, either way
    const sign = text ? a.localeCompare(b, undefined, { numeric: true }) : Number(a) - Number(b);
    return descending ? -sign : sign;
  });
  body.append(...rows.map(([, row]) => row));
  heads.forEach((one) => one.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const way = descending ? "descending" : "ascending";
  document.getElementById("sorted").textContent = `Sorted by ${head.textContent}, ${way}`;
}
heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
  order(column, head.getAttribute("aria-sort") === "ascending");
}));
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("aria-hidden", "true");  // what it says is in aria-label and aria-describedby
document.body.append(tip);
let shown = null;
function show(target) {
  shown = target;
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const at = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left + at.width / 2 - own.width / 2), innerWidth - own.width - 8);
  const below = at.bottom + 8 + own.height < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - own.height - 8)}px`;
}
function hide() {
  tip.hidden = true;
  shown = null;
}
function leave(event) {
  if (shown === event.currentTarget) hide();  // scrolling moves one target from under the mouse while another has the focus
}
for (const target of document.querySelectorAll("[data-tip]")) {
  target.addEventListener("pointerenter", () => show(target));
  target.addEventListener("pointerleave", leave);
  target.addEventListener("focus", () => show(target));
  target.addEventListener("blur", leave);
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
document.addEventListener("scroll", () => { if (shown) show(shown); }, true);  // focus scrolls, too
"""
