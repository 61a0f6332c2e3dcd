"use strict";
// The address is the state. A change asks the server for the new view, and its answer says the new address.

const at = (id) => document.getElementById(id);
const still = at("still") ? JSON.parse(at("still").textContent) : null;
const MOST = Number(document.body.dataset.most);
let query = location.search.slice(1), view = null, entries = [];
let waiting = null, asking = false, built = "", numbersOf = "";

function tell(text) { at("status").textContent = text; }

function refuse(text) {
  at("refusal").hidden = !text;
  at("refusal").textContent = text;
}

// -- asking: one request at a time, of several changes meanwhile the last one

function ask(want) {
  if (still) return;
  waiting = want;
  document.body.dataset.state = "asking";
  if (!asking) next();
}

async function next() {
  asking = true;
  while (waiting) {
    const want = waiting;
    waiting = null;
    try {
      const answer = await fetch("/view", { method: "POST", headers: { "content-type": "application/json" },
        body: JSON.stringify({ query: want.query ?? query, change: want.change }) });
      const got = await answer.json();
      if (!answer.ok) throw new Error(got.error);
      mark(null);
      query = got.query;
      if (!want.quiet) history[want.push ? "pushState" : "replaceState"](null, "", query ? `?${query}` : "/");
      show(got);
      if (got.screen === "truth" && !got.view.done && !waiting) waiting = { query, quiet: true };
    } catch (error) {
      if (error instanceof TypeError || error instanceof SyntaxError) {
        console.debug(error);
        refuse("The page's server does not answer. Start it again: lossmith explore");
      } else {
        refuse(error.message);
        mark(want.input);
        if (!view) at("view").replaceChildren(el("p", {}, el("a", { href: "/" }, "Start with the usual view")));
      }
    }
  }
  asking = false;
  document.body.dataset.state = "settled";
}

let marked = null;
function mark(input) {
  if (marked) marked.removeAttribute("aria-invalid");
  marked = input || null;
  if (marked) marked.setAttribute("aria-invalid", "true");
}

function move(key, values, how = {}) {
  const parts = new URLSearchParams(query);
  parts.delete(key);
  for (const value of [].concat(values)) parts.append(key, value);
  ask({ query: parts.toString(), ...how });
}

// -- showing

function show(got) {
  view = got;
  view.losses.forEach((one, k) => { one.k = k; });
  refuse("");
  const link = document.querySelector(`nav a[data-screen="${got.screen}"]`);
  document.querySelectorAll("nav a").forEach((a) => {
    a.toggleAttribute("aria-current", false);
    const parts = new URLSearchParams(query);
    if (!view.losses.length || !parts.has("loss")) view.losses.forEach((one) => parts.append("loss", one.call));
    parts.set("screen", a.dataset.screen);
    a.href = still ? `#${a.dataset.screen}` : `?${parts}`;
  });
  link.setAttribute("aria-current", "page");
  at("title").textContent = link.textContent;
  at("about").textContent = ABOUT[got.screen];
  document.title = `${link.textContent} – Lossmith explore`;
  losses();
  numbers();
  const opened = [...at("view").querySelectorAll("details")].map((d) => d.open);
  const scrolled = [...at("view").querySelectorAll(".scroll")].map((d) => d.scrollLeft);
  at("view").replaceChildren(...drawn[got.screen](got, got.view).filter(Boolean));
  [...at("view").querySelectorAll("details")].forEach((d, i) => { d.open = Boolean(opened[i]); });
  [...at("view").querySelectorAll(".scroll")].forEach((d, i) => { d.scrollLeft = scrolled[i] || 0; });
}

// Built anew when a loss or its choices change; else the values are set, so that a slider is not taken from the hand.
function losses() {
  const shape = JSON.stringify(view.losses.map((one) => [one.call.split("(")[0], one.error, one.traps, one.controls.map((c) => [c.name, c.kind, c.main, c.choices])]));
  if (shape !== built) {
    built = shape;
    const held = document.activeElement && document.activeElement.id;
    const opened = [...at("chosen").querySelectorAll("details")].map((d) => d.open);
    at("chosen").replaceChildren(...view.losses.map(lossBox));
    [...at("chosen").querySelectorAll("details")].forEach((d, i) => { d.open = Boolean(opened[i]); });
    if (held && at(held) && document.activeElement === document.body) at(held).focus();
  }
  view.losses.forEach((one, i) => {
    at(`call${i}`).textContent = one.call;
    one.controls.forEach((c) => set(`l${i}-${c.name}`, c));
  });
}

function lossBox(one, i) {
  const away = el("button", { type: "button", class: "only-live", "aria-label": `Remove ${one.call}` }, "✕");
  away.addEventListener("click", () => {
    const left = view.losses.filter((_, j) => j !== i).map((other) => other.call);
    if (left.length) move("loss", left, { push: true });
    at("find").focus();
  });
  const items = (text) => text.split(",").map((x) => x.trim()).filter(Boolean).map((x) => (isNaN(x) ? x : Number(x)));
  const changed = (c) => (value, input) =>
    ask({ change: { index: i, name: c.name, value: c.kind === "list" ? items(value) : value }, input });
  const make = (c) => control(`l${i}-${c.name}`, c, changed(c));
  const main = one.controls.filter((c) => c.main), rest = one.controls.filter((c) => !c.main);
  return el("section", { class: `loss k${i}`, "aria-labelledby": `call${i}` },
    el("div", { class: "head" }, el("h2", { class: "call", id: `call${i}` }, one.call), view.losses.length > 1 ? away : ""),
    one.error ? el("p", { class: "notice" }, one.error) : el("p", { class: "hint" }, one.summary),
    ...one.traps.map((trap) => el("p", { class: "notice trap" }, el("b", {}, "trap "), trap)),
    ...main.filter((c) => c.kind === "number").map(make),
    ...[[main.filter((c) => c.kind !== "number"), "Its main choices"], [rest, "Every other choice and parameter"]]
      .filter(([some]) => some.length).map(([some, title]) => el("details", {}, el("summary", {}, title), ...some.map(make))));
}

function numbers() {
  if (numbersOf !== view.screen) {
    numbersOf = view.screen;
    at("numbers").replaceChildren(...view.numbers.map((c) => control(`n-${c.name}`, c, (value, input) => change(c, value, input))));
  }
  view.numbers.forEach((c) => set(`n-${c.name}`, c));
}

// A group's three lists have one number a completion: the others follow the one that was typed.
function change(c, value, input) {
  if (c.kind !== "list") return move(c.name, String(value), { input });
  const text = value.split(",").map((x) => x.trim()).filter(Boolean), parts = new URLSearchParams(query);
  for (const other of view.numbers.filter((n) => n.kind === "list")) {
    const usual = { rewards: "0", lengths: "3", cut: "0" }[other.name];
    const now = other.name === c.name ? text : other.text.split(", ");
    parts.set(other.name, text.map((_, i) => now[i] ?? usual).join(","));
  }
  ask({ query: parts.toString(), input });
}

// -- controls

function control(id, c, changed) {
  const label = el("label", { for: id }, c.name, " ", el("span", {}, c.doc));
  const off = still !== null;
  if (c.kind === "choice") {
    const select = el("select", { id, disabled: off }, ...c.choices.map((x) => el("option", { value: x }, x)));
    select.addEventListener("change", () => changed(select.value, select));
    return el("div", { class: "control" }, label, select);
  }
  if (c.kind === "flag") {
    const box = el("input", { type: "checkbox", id, disabled: off });
    box.addEventListener("change", () => changed(box.checked, box));
    return el("div", { class: "control" }, label, box);
  }
  const field = el("input", { type: "text", id, autocomplete: "off", disabled: off, placeholder: c.optional ? "none" : "",
    inputmode: c.kind === "number" ? "decimal" : null });
  field.addEventListener("change", () => changed(typed(c, field.value), field));
  field.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); changed(typed(c, field.value), field); } });
  if (c.kind === "list") return el("div", { class: "control wide" }, label, field);
  const slider = el("input", { type: "range", id: `${id}-slider`, disabled: off, "aria-label": `${c.name}, slider`, min: c.low, max: c.high, step: c.step });
  slider.addEventListener("input", () => { field.value = slider.value; changed(Number(slider.value), slider); });
  return el("div", { class: "control" }, label, slider, field);
}

// As the library takes it: it says itself what it cannot take.
function typed(c, text) {
  const plain = text.trim();
  if (c.kind === "list") return plain;
  if (plain === "") return c.optional ? null : "";
  if (["inf", "infinity", "∞"].includes(plain.toLowerCase())) return "inf";
  return isNaN(plain) ? plain : Number(plain);
}

function set(id, c) {
  const input = at(id);
  if (!input) return;
  if (c.kind === "flag") { input.checked = c.value; return; }
  if (c.kind === "choice") { input.value = c.value; return; }
  if (document.activeElement !== input || c.kind === "number") input.value = c.text;
  const slider = at(`${id}-slider`);
  if (!slider) return;
  if (document.activeElement !== slider) { slider.min = c.low; slider.max = c.high; slider.step = c.step; }
  if (c.value !== null && document.activeElement !== slider) slider.value = c.value;
}

// -- the search

function find() {
  const words = at("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const rank = (e) => (e.name === words[0] ? 0 : e.name.startsWith(words[0]) ? 1 : e.name.includes(words[0]) ? 2 : 3);
  const hits = !words.length ? [] : entries.filter((e) => words.every((w) => `${e.name} ${e.summary} ${e.family} ${e.also}`.toLowerCase().includes(w)))
    .sort((a, b) => rank(a) - rank(b)).slice(0, 30);
  at("found").replaceChildren(...hits.map((e) => el("li", {}, el("button", { type: "button", onclick: () => add(e.name) },
    el("b", {}, e.name), el("span", {}, `${e.summary} ${e.family}`)))));
  tell(words.length ? `${hits.length} losses found` : "");
}

function add(call) {
  if (view && view.losses.length >= MOST) return refuse(`${MOST} losses are shown side by side; remove one first.`);
  at("find").value = "";
  find();
  move("loss", [...(view ? view.losses.map((one) => one.call) : []), call], { push: true });
}

// -- start

function start() {
  document.documentElement.classList.add("script");
  document.querySelectorAll("nav a").forEach((a) => a.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    if (still) { query = ""; show(still.views.find((v) => v.screen === a.dataset.screen)); } else move("screen", a.dataset.screen, { push: true });
  }));
  if (still) {
    document.body.classList.add("still");
    show(still.views.find((v) => v.screen === still.first));
    return;
  }
  at("numbers").addEventListener("submit", (event) => event.preventDefault());
  at("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = at("find").value.trim(), first = at("found").querySelector("b");
    if (text.includes("(")) add(text); else if (first) add(first.textContent);
    else if (text) refuse(`No loss is found by “${text}”.`);
  });
  at("find").addEventListener("input", find);
  window.addEventListener("popstate", () => { built = ""; numbersOf = ""; ask({ query: location.search.slice(1), quiet: true }); });
  fetch("/catalogue").then((answer) => answer.json()).then((got) => { entries = got; find(); });
  ask({ query });
}

start();
