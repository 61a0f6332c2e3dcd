"use strict";
// A ranking is tiers of cards, best first. What is on the screen is the state: a tier is a list item, a tie a tier of
// several cards.

let touched = false; // an order that nobody made is the one in which the outputs were shown
let warned = false;

function startRanking(tiers) {
  touched = warned = false;
  renumber(tiers);
  for (const grip of tiers.querySelectorAll(".grip")) grip.addEventListener("pointerdown", lift);
  for (const button of tiers.querySelectorAll("[data-move]")) {
    button.addEventListener("click", (event) => {
      move(button.closest(".card"), button.dataset.move);
      if (!event.detail) button.focus(); // pressed by key; after a mouse click Enter sends the ranking
    });
  }
}

function tier() {
  const made = document.createElement("li");
  made.className = "tier";
  return made;
}

function renumber(tiers) {
  for (const one of [...tiers.children]) if (!one.querySelector(".card")) one.remove();
  let place = 1;
  for (const one of tiers.children) {
    const cards = one.querySelectorAll(".card");
    one.classList.toggle("tied", cards.length > 1);
    for (const card of cards) card.querySelector(".place").textContent = cards.length > 1 ? `= ${place}` : `${place}`;
    place += 1;
  }
  const count = tiers.children.length;
  document.getElementById("count").textContent =
    count === 1 ? "1 place: all are equally good" : `${count} places${tiers.querySelector(".tied") ? ", with ties" : ""}`;
}

function move(card, how) {
  const here = card.parentElement;
  const tiers = here.parentElement;
  const alone = here.children.length === 1;
  const above = here.previousElementSibling;
  const below = here.nextElementSibling;
  if (how === "tie" && alone && above) above.append(card);
  else if (how === "tie" && alone) return say("There is none above.");
  else if (!alone) {
    const own = tier();
    how === "up" ? here.before(own) : here.after(own);
    own.append(card);
  } else if (how === "up" && above) above.before(here);
  else if (how === "down" && below) below.after(here);
  else return say("It cannot move further.");
  changed(tiers, card);
}

function changed(tiers, card) {
  touched = true;
  warned = false;
  renumber(tiers);
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "nearest" });
  say(`${card.getAttribute("aria-label")}: place ${card.querySelector(".place").textContent} of ${tiers.children.length}`);
}

function say(text) {
  document.getElementById("said").textContent = text;
}

function rankingKey(event) {
  const how = { ArrowUp: "up", ArrowDown: "down", "=": "tie" }[event.key];
  const card = event.target.closest(".card");
  if (!how || !card) return false;
  event.preventDefault();
  move(card, how);
  return true;
}

function rankingToSend(form) {
  if (!touched && !warned) {
    warned = true;
    complain("This is the order in which they were shown, by chance. Send once more if it is your ranking.", null);
    return false;
  }
  const tiers = [...document.getElementById("tiers").children];
  const ids = tiers.map((one) => [...one.querySelectorAll(".card")].map((card) => card.dataset.output));
  form.elements.value.value = JSON.stringify(ids);
  return true;
}

// -- dragging --------------------------------------------------------------------------------------------------------

function lift(event) {
  if (event.button !== 0 || event.target.closest("button")) return;
  event.preventDefault();
  const grip = event.currentTarget;
  const card = grip.closest(".card");
  const start = event.pageY;
  let target = null;
  grip.setPointerCapture(event.pointerId);
  card.focus({ preventScroll: true });
  card.classList.add("dragging");

  const drag = (moved) => {
    if (moved.clientY < 60) window.scrollBy(0, -12);
    if (moved.clientY > window.innerHeight - 120) window.scrollBy(0, 12);
    card.style.transform = `translateY(${moved.pageY - start}px)`;
    unmark();
    target = aimedAt(card, moved.clientY);
    if (target) target.element.classList.add(target.how);
  };
  const end = (dropped) => {
    grip.removeEventListener("pointermove", drag);
    card.classList.remove("dragging");
    card.style.transform = "";
    unmark();
    if (dropped.type === "pointerup" && target) drop(card, target);
  };
  grip.addEventListener("pointermove", drag);
  grip.addEventListener("pointerup", end, { once: true });
  grip.addEventListener("pointercancel", end, { once: true });
}

function unmark() {
  for (const one of document.querySelectorAll(".before, .after, .tie-here")) one.classList.remove("before", "after", "tie-here");
}

// The middle of another card ties with it; its edges, and the gaps, are the places before and after its tier.
function aimedAt(card, y) {
  const tiers = [...document.getElementById("tiers").children].filter((one) => one.children.length > 1 || !one.contains(card));
  for (const one of tiers) {
    const others = [...one.querySelectorAll(".card")].filter((other) => other !== card);
    for (const other of others) {
      const box = other.getBoundingClientRect();
      if (y > box.top + box.height * 0.3 && y < box.bottom - box.height * 0.3) return { element: other, how: "tie-here" };
    }
    const box = one.getBoundingClientRect();
    if (y < (box.top + box.bottom) / 2) return { element: one, how: "before" };
  }
  return tiers.length ? { element: tiers[tiers.length - 1], how: "after" } : null;
}

function drop(card, { element, how }) {
  const tiers = document.getElementById("tiers");
  if (how === "tie-here") element.parentElement.append(card);
  else {
    const own = tier();
    how === "before" ? element.before(own) : element.after(own);
    own.append(card);
  }
  changed(tiers, card);
}
