"use strict";
(() => {
  const table = document.getElementById("questions");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const search = document.getElementById("search");
  const show = document.getElementById("show");
  const count = document.getElementById("count");

  const matches = (row) => {
    const text = search.value.trim().toLowerCase();
    if (text && !row.textContent.toLowerCase().includes(text)) return false;
    const [kind, arm] = show.value.split(":");
    if (kind === "disagree") return row.dataset.disagree === "true";
    if (kind === "unanswerable") return row.dataset.answerable === "false";
    if (kind === "right" || kind === "wrong" || kind === "failed") {
      return row.cells[Number(arm)].dataset.verdict === kind;
    }
    return true;
  };

  const filter = () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = !matches(row);
      if (!row.hidden) shown += 1;
    }
    count.textContent = `${shown} of ${rows.length} questions`;
  };

  const sort = (header) => {
    const column = header.cellIndex;
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const numeric = header.dataset.sort === "number";
    const value = (row) => {
      const text = row.cells[column].dataset.value;
      return numeric ? Number(text) : text;
    };
    const compare = (a, b) => {
      const x = value(a);
      const y = value(b);
      const order = numeric ? x - y : x.localeCompare(y);
      return descending ? -order : order;
    };
    rows.sort(compare);
    body.append(...rows);
  };

  for (const button of table.tHead.querySelectorAll("button")) {
    button.addEventListener("click", () => sort(button.closest("th")));
  }
  search.addEventListener("input", filter);
  show.addEventListener("change", filter);
  filter();
})();
