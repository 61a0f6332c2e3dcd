"use strict";
// The page is drawn by the server; here a changed field asks for the new page and what differs is put in its place.
// Nothing is computed: numbers that the mouse reads off a drawing lie beside it, as text.

let busy = false;
let waiting = null; // the newest address that was asked for meanwhile
let follow = false; // whether the first loss that the search finds is wanted

const form = document.getElementById("view");
const live = form && !("static" in form.dataset);
document.documentElement.classList.add("script");

function changed(name, value) {
  const query = new URLSearchParams(form.dataset.address);
  query.set(name, value);
  return "?" + query;
}

async function turnTo(address, push) {
  if (busy) { waiting = [address, push]; return; }
  busy = true;
  form.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch("/" + address, { headers: { accept: "text/html" } });
    const found = new DOMParser().parseFromString(await answer.text(), "text/html");
    const next = found.getElementById("view");
    if (!next) throw new Error(answer.statusText);
    const held = handle(document.activeElement);
    morph(form, next);
    if (held && document.activeElement === document.body) takeUp(held);
    readAgain();
    document.title = found.title;
    const clean = form.dataset.address || "/";
    if (push) history.pushState(null, "", clean); else history.replaceState(null, "", clean);
  } catch (error) {
    const said = document.getElementById("said");
    said.textContent = "";
    const p = document.createElement("p");
    p.className = "notice";
    p.textContent = "The server does not answer. Start lossmith explore again, and reload.";
    said.append(p);
    waiting = null;
  } finally {
    busy = false;
    form.removeAttribute("aria-busy");
  }
  if (waiting) { const [to, how] = waiting; waiting = null; return turnTo(to, how); }
  if (follow) return takeFirst();
  if ("more" in form.dataset) return turnTo(form.dataset.address, false);
}

// How to find a control again that went to another place of the page with what was changed.
function handle(control) {
  if (!control || !form.contains(control)) return "";
  return control.dataset.for ? `[data-for="${control.dataset.for}"]` : control.id ? `[id="${control.id}"]` : "";
}

function takeUp(held) {
  const control = form.querySelector(held);
  if (!control) return;
  const folded = control.closest("details");
  if (folded) folded.open = true;
  control.focus();
}

function takeFirst() {
  const first = document.querySelector("#found a");
  follow = false;
  if (!first) return;
  document.getElementById("f-q").value = "";
  return turnTo(first.getAttribute("href"), true);
}

// Makes one tree like another, and leaves alone what is being typed into, unfolded, or focused.
function morph(old, next) {
  for (const { name } of [...old.attributes]) {
    if (!next.hasAttribute(name) && !(name === "open") && name !== "aria-busy") old.removeAttribute(name);
  }
  for (const { name, value } of next.attributes) {
    if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (old.tagName === "INPUT" || old.tagName === "SELECT") {
    if (old.tagName === "SELECT") children(old, next);
    const typing = old === document.activeElement && old.tagName === "INPUT" && old.type !== "range";
    if (!typing && old !== document.activeElement) {
      old.value = old.tagName === "INPUT" ? next.getAttribute("value") || "" : next.value;
    }
    return;
  }
  children(old, next);
}

function children(old, next) {
  const wanted = [...next.childNodes];
  for (let i = 0; i < wanted.length; i++) {
    const there = wanted[i];
    const known = there.id && [...old.children].find((e) => e.id === there.id && e.nodeName === there.nodeName);
    if (known && known !== old.childNodes[i]) old.insertBefore(known, old.childNodes[i]);
    const here = old.childNodes[i];
    if (!here) old.append(document.importNode(there, true));
    else if (here.nodeType !== there.nodeType || here.nodeName !== there.nodeName ||
        (here.id || "") !== (there.id || "")) old.insertBefore(document.importNode(there, true), here);
    else if (here.nodeType === 1) morph(here, there);
    else if (here.data !== there.data) here.data = there.data;
  }
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}

if (live) {
  form.addEventListener("input", (event) => {
    const at = event.target;
    if (at.dataset.for) {
      const field = document.getElementById("f-" + at.dataset.for);
      const value = "log" in at.dataset ? Number((10 ** at.value).toPrecision(3)) : Number(at.value);
      field.value = value;
      turnTo(changed(at.dataset.for, value), false);
    } else if (at.name === "q" || at.tagName === "SELECT") {
      turnTo(changed(at.name, at.value), false);
    }
  });
  form.addEventListener("change", (event) => {
    const at = event.target;
    if (at.name && at.name !== "q" && at.tagName === "INPUT") turnTo(changed(at.name, at.value), false);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const at = document.activeElement;
    if (!at || !at.name) return;
    follow = at.name === "q";
    turnTo(changed(at.name, at.value), false);
  });
  form.addEventListener("click", (event) => {
    const link = event.target.closest("a[href]");
    if (!link || link.hasAttribute("download") || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const to = link.getAttribute("href");
    if (!to.startsWith("?")) return;
    event.preventDefault();
    const turned = link.closest("nav, .turn"), gone = link.closest("#found, .chosen");
    turnTo(to, true).then(() => {
      if (turned) window.scrollTo(0, 0);
      if (gone) document.getElementById("f-q").focus();
    });
  });
  window.addEventListener("popstate", () => turnTo(location.search || "?", false));
  if ("more" in form.dataset) turnTo(form.dataset.address, false);
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest(".copy");
  if (!button) return;
  const text = button.parentElement.querySelector("pre, code").textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(button.parentElement.querySelector("pre, code"));
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
});

// -- reading a drawing ---------------------------------------------------------------------------------------------

const rowsOf = (drawing) => JSON.parse(drawing.querySelector("script").textContent);

function nearest(drawing, clientX) {
  const box = drawing.querySelector("svg").getBoundingClientRect();
  const share = (clientX - box.left) / box.width;
  const rows = rowsOf(drawing);
  return rows.reduce((best, row, i) => (Math.abs(row[0] - share) < Math.abs(rows[best][0] - share) ? i : best), 0);
}

function hide(drawing) {
  drawing.querySelector(".reading").hidden = true;
  for (const end of ["x1", "x2"]) drawing.querySelector(".hover").setAttribute(end, -9);
}

function read(drawing, index) {
  const rows = rowsOf(drawing);
  if (!rows.length) return;
  const at = Math.min(Math.max(index, 0), rows.length - 1), row = rows[at];
  drawing.dataset.at = at;
  const x = row[0] * drawing.querySelector("svg").viewBox.baseVal.width;
  for (const end of ["x1", "x2"]) drawing.querySelector(".hover").setAttribute(end, x);
  const said = drawing.querySelector(".reading");
  said.textContent = row[1];
  for (const [place, name, value] of row[2]) {
    const b = document.createElement("b");
    b.className = "badge c" + place;
    b.textContent = name;
    said.append("  ", b, " ", value);
  }
  said.hidden = false;
}

function keep(drawing) {
  const row = rowsOf(drawing)[drawing.dataset.at];
  if (live && row && drawing.dataset.chart.startsWith("weight") && document.getElementById("f-ratio")) {
    turnTo(changed("ratio", row[1]), false);
  }
}

const focused = () => document.activeElement && document.activeElement.closest(".drawing");

function readAgain() {
  const drawing = focused();
  if (drawing) read(drawing, Number(drawing.dataset.at || 0));
}

document.addEventListener("pointermove", (event) => {
  const drawing = event.target.closest && event.target.closest(".drawing");
  for (const other of document.querySelectorAll(".drawing")) if (other !== drawing && other !== focused()) hide(other);
  if (drawing) read(drawing, nearest(drawing, event.clientX));
});

document.addEventListener("click", (event) => {
  const drawing = event.target.closest(".drawing");
  if (!drawing) return;
  read(drawing, nearest(drawing, event.clientX));
  keep(drawing);
});

document.addEventListener("keydown", (event) => {
  const drawing = focused();
  if (!drawing) return;
  const by = { ArrowLeft: -1, ArrowRight: 1, PageDown: -20, PageUp: 20, Home: -1e6, End: 1e6 }[event.key];
  if (by !== undefined) read(drawing, Number(drawing.dataset.at || 0) + by);
  else if (event.key === "Enter") keep(drawing);
  else return;
  event.preventDefault();
});

document.addEventListener("focusin", readAgain);
document.addEventListener("focusout", (event) => {
  const drawing = event.target.closest(".drawing");
  if (drawing) hide(drawing);
});
