// Tables as files, made in the page.
report.csv = (rows) => {
  const field = (value) => {
    let text = String(value ?? "");
    // A spreadsheet would take such a text for a formula.
    if (/^\s*[=+@\uff1d\uff0b\uff20\uff0d-]|^[\t\r\n]/.test(text) && !Number.isFinite(Number(text))) text = `'${text}`;
    return /[",;\t\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
};

report.download = (name, rows) => {
  const address = URL.createObjectURL(new Blob([report.csv(rows)], { type: "text/csv" }));
  const link = report.element("a", { href: address, download: `${name}.csv` });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
};
