"use strict";
(() => {
  const table = document.getElementById("rows");
  if (!table) return;
  const heads = [...table.tHead.rows[0].cells], names = heads.map(h => h.textContent);
  const body = table.tBodies[0], rows = [...body.rows], place = document.getElementById("controls");
  const cell = (row, name) => row.cells[names.indexOf(name)].textContent;
  const value = text => parseFloat(text.replace("\u2212", "-"));

  const control = (label, element) => {
    const around = document.createElement("div"), name = document.createElement("label");
    element.id = name.htmlFor = "by-" + label.toLowerCase().replaceAll(" ", "-");
    name.append(label);
    around.append(name, element);
    place.append(around);
    element.addEventListener("input", show);
    return element;
  };
  const input = type => Object.assign(document.createElement("input"), { type, step: "any" });
  const choice = name => {
    const select = document.createElement("select");
    select.append(new Option("all", ""));
    for (const found of new Set(rows.map(row => cell(row, name)))) select.append(new Option(found, found));
    return select;
  };
  const search = control("Text in prompt or completion", input("search"));
  const run = names.includes("run") ? control("Run", choice("run")) : null;
  const step = control("Step", choice("step"));
  const least = control("Score at least", input("number"));
  const most = control("Score at most", input("number"));
  const count = document.createElement("p");
  count.setAttribute("role", "status");
  place.append(count);

  const texts = rows.map(row => (cell(row, "prompt") + "\n" + cell(row, "completion")).toLowerCase());
  const fits = (row, i) => {
    const score = value(cell(row, "score"));
    return texts[i].includes(search.value.toLowerCase())
      && (!run || !run.value || cell(row, "run") === run.value)
      && (!step.value || cell(row, "step") === step.value)
      && (least.value === "" || score >= least.valueAsNumber)
      && (most.value === "" || score <= most.valueAsNumber);
  };
  function show() {
    let shown = 0;
    rows.forEach((row, i) => { shown += !(row.hidden = !fits(row, i)); });
    count.textContent = `${shown} of ${rows.length} shown`;
  }
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
      const key = row => { const text = row.cells[column].textContent, n = value(text); return isNaN(n) ? text : n; };
      const order = rows.map(row => [key(row), row]).sort(([a], [b]) => {
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
        return up * (typeof a === "number" ? a - b : a.localeCompare(b));
      });
      body.append(...order.map(([, row]) => row));
    });
  });
  const how = document.getElementById("how");
  for (const row of rows) {
    const place = row.cells[names.indexOf("no.")], button = document.createElement("button");
    Object.assign(button, { type: "button", title: "the command that explains this completion" });
    button.append(...place.childNodes);
    place.append(button);
    button.addEventListener("click", () => { how.textContent = row.dataset.how; });
  }
  show();
})();
