"use strict";
// Answers are sent without leaving the page, so that one that cannot be saved stays on the screen. Without this script
// every form still works by itself, but for the ranking.

const SETTLE = 300; // ms: a double click on one item must not answer the next one
let busy = false;
let readyAt = 0;
let looked = 0; // ms for which this item was on a visible screen
let since = 0;

const get = (selector) => document.querySelector(selector);
const typing = (element) => element.matches("textarea, input, select");

function arrived() {
  const page = get("#page");
  readyAt = performance.now() + SETTLE;
  setTimeout(() => { page.dataset.ready = "yes"; }, SETTLE);
  looked = 0;
  since = performance.now();
  const tiers = get("#tiers");
  if (tiers) startRanking(tiers);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) looked += performance.now() - since;
  else since = performance.now();
});

function complain(text, again) {
  const toast = get("#toast");
  toast.querySelector("p").textContent = text;
  toast.hidden = false;
  const button = toast.querySelector(".again");
  button.hidden = !again;
  button.onclick = again;
}

async function send(action, body) {
  if (busy) return;
  busy = true;
  get("#toast").hidden = true;
  try {
    const answer = await fetch(action, { method: "POST", body, credentials: "same-origin" });
    const found = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (answer.ok) return turnTo(found);
    const why = found.querySelector("#message");
    complain(why ? why.textContent : `The server refused this (${answer.status}).`,
      answer.status === 503 ? () => send(action, body) : null);
  } catch {
    complain("The server cannot be reached, so this is not saved yet. It is kept here: start the server again or " +
      "wait, then send again.", () => send(action, body));
  } finally {
    busy = false;
  }
}

function turnTo(found) {
  const unfolded = get("#criteria") ? get("#criteria").open : null;
  const next = found.querySelector("#page");
  const criteria = next.querySelector("#criteria");
  if (criteria && unfolded !== null) criteria.open = unfolded;
  next.classList.add("arrived");
  get("#page").replaceWith(document.adoptNode(next));
  document.title = found.title;
  window.scrollTo(0, 0);
  const heading = get("#page h1");
  if (heading) heading.focus({ preventScroll: true });
  arrived();
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.method !== "post" || !["/answer", "/undo"].includes(form.getAttribute("action"))) return;
  event.preventDefault();
  if (busy || performance.now() < readyAt) return;
  const kind = event.submitter && event.submitter.name === "kind";
  const answers = form.getAttribute("id") === "answer"; // form.id would be its field of that name
  if (get("#tiers") && answers && !kind && !rankingToSend(form)) return;
  if (answers) {
    form.elements.seconds.value = ((looked + performance.now() - since) / 1000).toFixed(2);
  }
  send(form.getAttribute("action"), new URLSearchParams(new FormData(form, event.submitter)));
});

function open(name) {
  const target = document.getElementById(name);
  if (target.showModal) return target.showModal();
  for (const other of document.querySelectorAll(".more[open]")) other.open = false;
  target.closest("details").open = true;
  target.focus();
}

document.addEventListener("click", (event) => {
  const opener = event.target.closest("[data-opens]");
  if (!opener) return;
  const details = opener.closest("details");
  if (details && details.open) return; // the browser closes it
  event.preventDefault();
  open(opener.dataset.opens);
});

document.addEventListener("keydown", (event) => {
  const at = event.target;
  if (typing(at)) {
    if (event.key === "Escape") leave(at);
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      const button = get(`[data-in="${at.id}"]`);
      if (button) button.click();
    }
    return;
  }
  if (get("dialog[open]") || event.repeat && event.key.length === 1) return;
  let key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if ((event.ctrlKey || event.metaKey) && key === "z") key = "u";
  else if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (get("#tiers") && rankingKey(event)) return;
  // Enter and the space bar press the button that has the focus.
  if (key === "Enter" && at.closest("button, summary, a")) return;
  const button = get(`#page [data-keys~="${CSS.escape(key)}"]`);
  if (!button) return;
  event.preventDefault();
  if (!event.repeat) button.click();
});

function leave(field) {
  field.blur();
  const details = field.closest("details");
  if (details) details.open = false;
}

document.documentElement.classList.add("script");
arrived();
