"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const at = (name, n) => document.getElementById(name + n);

// Plotly takes tags for markup, and what stands between dollars for maths: a token "<s>" would not be seen.
const plain = (text) => typeof text === "string" ? text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll("$", "&#36;") : text;
const each = (values, change) => Array.isArray(values) ? values.map((one) => each(one, change)) : change(values);

function written(trace, ink) {
  const texts = { name: plain(trace.name), x: each(trace.x, plain), y: each(trace.y, plain) };
  if (trace.type === "bar" && trace.error_y) texts.error_y = { ...trace.error_y, color: ink };
  return { ...trace, ...texts, hovertext: each(trace.customdata, plain), hovertemplate: "%{hovertext}<extra></extra>" };
}

function draw(n) {
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
  const layout = { ...charts[n].layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 13 } };
  layout.xaxis = { ...axis, automargin: true, ...layout.xaxis };
  for (const name of Object.keys({ yaxis: 0, ...layout }).filter((key) => key.startsWith("yaxis"))) layout[name] = { ...axis, ...layout[name] };
  layout.margin = { t: 30, r: 10, b: 60, ...layout.margin };
  if (matchMedia("(max-width: 45rem)").matches) layout.legend = { orientation: "h", x: 0, y: 1, yanchor: "bottom", ...layout.legend }; // above: names of groups may be long
  const touched = matchMedia("(pointer: coarse)").matches;
  if (touched) layout.dragmode = false; // a finger scrolls the page
  Plotly.react(at("chart", n), charts[n].data.map((trace) => written(trace, ink)), layout, { responsive: true, displaylogo: false, displayModeBar: touched ? false : "hover" });
}

const clickable = new Set();

function show(n) {
  document.querySelectorAll(".view").forEach((view, other) => { view.hidden = other !== n; });
  draw(n);
  if (!clickable.has(n)) at("chart", n).on("plotly_click", (event) => tell(n, event.points[0].customdata));
  clickable.add(n);
}

function tell(n, text) {
  if (typeof text === "string") at("chosen", n).textContent = text;
}

// Arrow keys: through the cells of a map, or along a line and from line to line.
function walk(n) {
  const data = charts[n].data, map = data[0].type === "heatmap";
  const place = [0, 0];
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  at("chart", n).addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const rows = map ? data[0].customdata : data.map((each) => each.customdata);
    place[0] = Math.min(Math.max(place[0] + step[0], 0), rows.length - 1);
    place[1] = Math.min(Math.max(place[1] + step[1], 0), rows[place[0]].length - 1);
    tell(n, rows[place[0]][place[1]]);
    const point = map ? { curveNumber: 0, pointNumber: [...place] } : { curveNumber: place[0], pointNumber: place[1] };
    Plotly.Fx.hover(at("chart", n), [point]);
  });
}

if (charts.length) {
  let seen = 0;
  show(seen);
  charts.forEach((_, n) => walk(n));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(seen));
  document.getElementById("switch")?.addEventListener("change", (event) => show((seen = Number(event.target.value))));
}

function key(row, column) {
  const cell = row.cells[column], number = Number(cell.dataset.value ?? "x");
  return Number.isNaN(number) ? cell.textContent : number;
}

function ordered(x, y) {
  if (typeof x === "number" && typeof y === "number") return x - y;
  if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
  return x.localeCompare(y, "en", { numeric: true });
}

document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  head.parentElement.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const sign = down ? -1 : 1;
  body.append(...[...body.rows].sort((a, b) => sign * ordered(key(a, head.cellIndex), key(b, head.cellIndex))));
}));

document.querySelectorAll(".filter").forEach((input) => input.addEventListener("input", () => {
  const wanted = input.value.toLowerCase();
  for (const row of input.closest("p").nextElementSibling.querySelector("tbody").rows)
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
}));

function openRecord() {
  const wanted = document.getElementById(location.hash.slice(1));
  if (wanted?.tagName !== "DETAILS") return;
  wanted.open = true;
  wanted.scrollIntoView();
  wanted.querySelector("summary").focus();
}
addEventListener("hashchange", openRecord);
openRecord();
