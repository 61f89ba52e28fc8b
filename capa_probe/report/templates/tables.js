// Tables that a click on a heading sorts, up and then down, and that can be downloaded.
report.sortTable = (table, column, direction) => {
  const numeric = table.tHead.rows[0].cells[column].classList.contains("numeric");
  const value = (row) => {
    const text = row.cells[column].dataset.value;
    return numeric ? (text === "" ? NaN : Number(text)) : text;
  };
  const order = (one, two) => {
    const [a, b] = [value(one), value(two)];
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b); // what is not known comes last
    const sign = direction === "descending" ? -1 : 1;
    return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  [...table.tHead.rows[0].cells].forEach((head, number) => {
    if (number === column) head.setAttribute("aria-sort", direction);
    else head.removeAttribute("aria-sort");
  });
};

report.showSort = () => {
  const [name, column, direction] = report.state.sort.split(":");
  const table = name ? document.getElementById(name) : null;
  if (!/^\d+$/.test(column) || !table?.tHead?.rows[0].cells[column] || !["ascending", "descending"].includes(direction)) return;
  report.sortTable(table, Number(column), direction);
};

report.startTables = () => {
  for (const table of document.querySelectorAll("#tables table")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      report.change({ sort: `${table.id}:${column}:${direction}` });
    }));
  }
  for (const button of document.querySelectorAll("#tables .csv")) {
    button.addEventListener("click", () => {
      const table = document.getElementById(button.dataset.table);
      const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
      const rows = [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.dataset.value));
      report.download(table.id, [heads, ...rows]);
    });
  }
  report.onChange((changed) => { if (changed.has("sort")) report.showSort(); });
  report.showSort();
};
