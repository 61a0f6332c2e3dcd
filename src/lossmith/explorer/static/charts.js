"use strict";
// Lines of numbers that came with their texts; what is read under the pointer is a text, never computed here.

function el(tag, about = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(about)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...inside.filter((x) => x !== null && x !== undefined && x !== ""));
  return made;
}

function svg(tag, about, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(about)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const SIZE = { width: 560, height: 300, left: 52, right: 14, top: 12, bottom: 34 };

function ticks(low, high) {
  const rough = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(+(i * step).toPrecision(6));
  return found;
}

// what: {label, x: [], xTexts: [], xName, log, xTicks, low, high, series: [{k, name, y: [], texts: [], stopped: []}], mark}
function chart(what) {
  const count = what.series.filter((s) => (s.stopped || []).length).length;
  const size = { ...SIZE, bottom: SIZE.bottom + count * 10 };
  const scale = what.log ? Math.log : (v) => v;
  const first = scale(what.x[0]), last = scale(what.x[what.x.length - 1]);
  const px = (v) => size.left + (size.width - size.left - size.right) * (last > first ? (scale(v) - first) / (last - first) : 0);
  const base = size.height - size.bottom;
  const py = (v) => base - (base - size.top) * (v - what.low) / (what.high - what.low);
  const shown = svg("svg", { viewBox: `0 0 ${size.width} ${size.height}`, role: "img", "aria-label": what.label, tabindex: "0" });
  for (const v of ticks(what.low, what.high)) {
    shown.append(svg("line", { class: v === what.mark ? "one" : "grid", x1: size.left, x2: size.width - size.right, y1: py(v), y2: py(v) }));
    shown.append(svg("text", { x: size.left - 7, y: py(v) + 4, "text-anchor": "end" }, String(v).replace("-", "−")));
  }
  for (const v of what.xTicks || ticks(what.x[0], what.x[what.x.length - 1]).filter(Number.isInteger)) {
    shown.append(svg("line", { class: what.log && v === 1 ? "one" : "grid", x1: px(v), x2: px(v), y1: size.top, y2: base }));
    shown.append(svg("text", { x: px(v), y: base + 16, "text-anchor": "middle" }, String(v)));
  }
  shown.append(svg("text", { x: size.width - size.right, y: size.height - 3, "text-anchor": "end" }, what.xName));
  let bar = 0;
  for (const one of what.series) {
    const group = svg("g", { class: `k${one.k}` });
    for (const { from, to } of one.stopped || []) {
      const at = { x: px(from), width: Math.max(px(to) - px(from), 0.5) };
      group.append(svg("rect", { class: "stopped", ...at, y: size.top, height: base - size.top }));
      group.append(svg("rect", { class: "bar", ...at, y: base + 22 + 10 * bar, height: 6 }));
    }
    if ((one.stopped || []).length) bar += 1;
    for (const points of pieces(one, what, px, py)) group.append(svg("polyline", { class: `line d${one.k}`, points }));
    shown.append(group);
  }
  const cursor = svg("line", { class: "cursor", y1: size.top, y2: base, visibility: "hidden" });
  shown.append(cursor);
  const read = el("div", { class: "read", "aria-live": "polite" });
  const box = el("div", { class: "chart" }, shown, read);
  watch(shown, what, px, cursor, read, size);
  return el("figure", {}, el("figcaption", {}, what.label), box);
}

// The curve, broken where it jumps to or from 0, and cut at the frame.
function pieces(one, what, px, py) {
  const found = [[]];
  let before = null;
  one.y.forEach((w, i) => {
    if (w === null) { found.push([]); before = null; return; }
    const jump = before !== null && what.log && (w === 0) !== (before === 0) && Math.abs(w - before) > 0.02 * (what.high - what.low);
    if (jump) found.push([]);
    if (w <= what.high && w >= what.low) found[found.length - 1].push(`${px(what.x[i]).toFixed(1)},${py(w).toFixed(1)}`);
    else if (found[found.length - 1].length) found.push([]);
    before = w;
  });
  return found.filter((p) => p.length).map((p) => (p.length === 1 ? [p[0], p[0]] : p).join(" "));
}

function watch(shown, what, px, cursor, read, size) {
  const places = what.x.map(px);
  let at = what.log ? what.x.findIndex((r) => r >= 1) : what.x.length - 1;
  const say = (i) => {
    at = Math.min(Math.max(i, 0), places.length - 1);
    cursor.setAttribute("x1", places[at]);
    cursor.setAttribute("x2", places[at]);
    const parts = [el("span", {}, `${what.xName.split(" ")[0]} = ${what.xTexts[at]}`)];
    for (const one of what.series) {
      if (one.texts[at] !== undefined) parts.push(el("span", { class: `key k${one.k}` }, el("i"), `${one.name} ${one.texts[at]}`));
    }
    read.replaceChildren(...parts);
  };
  const nearest = (event) => {
    const frame = shown.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * size.width;
    let best = 0;
    places.forEach((p, i) => { if (Math.abs(p - x) < Math.abs(places[best] - x)) best = i; });
    cursor.setAttribute("visibility", "visible");
    say(best);
  };
  shown.addEventListener("pointermove", nearest);
  shown.addEventListener("pointerdown", nearest);
  shown.addEventListener("focus", () => { cursor.setAttribute("visibility", "visible"); say(at); });
  shown.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageDown: -20, PageUp: 20, Home: -1e6, End: 1e6 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    say(at + by);
  });
  say(at);
}
