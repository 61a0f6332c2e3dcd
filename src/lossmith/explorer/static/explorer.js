"use strict";
// The page is drawn by the server; here a changed field asks for the new page and what differs is put in its place.
// Nothing is computed: numbers that the mouse reads off a drawing lie beside it, as text.

let busy = false;
let waiting = null; // the newest address that was asked for meanwhile

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
    morph(form, next);
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
  if (waiting) { const [to, how] = waiting; waiting = null; turnTo(to, how); }
  else if ("more" in form.dataset) turnTo(form.dataset.address, false);
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
    const here = old.childNodes[i];
    const there = wanted[i];
    if (!here) old.append(document.importNode(there, true));
    else if (here.nodeType !== there.nodeType || here.nodeName !== there.nodeName ||
        (here.id || "") !== (there.id || "")) here.replaceWith(document.importNode(there, true));
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
    if (at && at.name) turnTo(changed(at.name, at.value), false);
  });
  form.addEventListener("click", (event) => {
    const link = event.target.closest("a[href]");
    if (!link || link.hasAttribute("download") || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const to = link.getAttribute("href");
    if (!to.startsWith("?")) return;
    event.preventDefault();
    const turned = link.closest("nav, .turn");
    turnTo(to, true).then(() => { if (turned) window.scrollTo(0, 0); });
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

function reading(drawing, clientX) {
  const svg = drawing.querySelector("svg");
  const box = svg.getBoundingClientRect();
  const share = (clientX - box.left) / box.width;
  const rows = JSON.parse(drawing.querySelector("script").textContent);
  if (!rows.length) return null;
  let best = rows[0];
  for (const row of rows) if (Math.abs(row[0] - share) < Math.abs(best[0] - share)) best = row;
  return best;
}

document.addEventListener("pointermove", (event) => {
  const drawing = event.target.closest && event.target.closest(".drawing");
  for (const other of document.querySelectorAll(".drawing")) {
    if (other === drawing) continue;
    other.querySelector(".reading").hidden = true;
    other.querySelector(".hover").setAttribute("x1", -9);
    other.querySelector(".hover").setAttribute("x2", -9);
  }
  const row = drawing && reading(drawing, event.clientX);
  if (!row) return;
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
});

document.addEventListener("click", (event) => {
  const drawing = event.target.closest(".drawing[data-chart^=weight]");
  const field = document.getElementById("f-ratio");
  if (!live || !drawing || !field) return;
  const row = reading(drawing, event.clientX);
  if (row) turnTo(changed("ratio", row[1]), false);
});
