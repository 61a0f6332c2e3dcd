// Tables of more than eight rows can be sorted by their heads, by mouse or keyboard; long ones can be filtered.
(function () {
  "use strict";

  function value(cell) {
    const text = cell.textContent.trim();
    const number = /^[T^~×]*\s*(-?[\d.]+(?:e[+-]?\d+)?)/i.exec(text.replace("−", "-"));
    return number ? { number: parseFloat(number[1]), text } : { number: null, text };
  }

  function order(a, b, ascending) {
    const x = value(a), y = value(b);
    if ((x.number === null) !== (y.number === null)) return x.number === null ? 1 : -1; // numbers first, either way
    const way = x.number === null ? x.text.localeCompare(y.text) : x.number - y.number;
    return ascending ? way : -way;
  }

  function sortable(table) {
    const body = table.tBodies[0];
    table.querySelectorAll("thead th").forEach(function (head, column) {
      if (!head.textContent.trim()) return;
      head.setAttribute("role", "button");
      head.setAttribute("tabindex", "0");
      function sort() {
        const ascending = head.getAttribute("aria-sort") !== "ascending";
        table.querySelectorAll("th").forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        const rows = Array.from(body.rows);
        rows.sort((a, b) => order(a.cells[column], b.cells[column], ascending));
        body.append(...rows);
      }
      head.addEventListener("click", sort);
      head.addEventListener("keydown", function (event) {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
      });
    });
  }

  function filterable(table) {
    const field = document.createElement("input");
    field.type = "search";
    field.className = "filter";
    field.placeholder = "Show rows with ...";
    field.setAttribute("aria-label", "Show rows with");
    field.addEventListener("input", function () {
      const wanted = field.value.toLowerCase();
      Array.from(table.tBodies[0].rows).forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
    });
    (table.closest(".md-typeset__scrollwrap") || table).before(field);
  }

  document.querySelectorAll(".md-content table:not([class])").forEach(function (table) {
    if (!table.tBodies.length || table.tBodies[0].rows.length <= 8) return;
    sortable(table);
    if (table.tBodies[0].rows.length > 40) filterable(table);
  });
})();
