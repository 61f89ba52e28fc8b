// How numbers are written: five digits, of which the last may be one off; cosines near 1 with those that tell them apart.
report.number = (value) => {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size < 1e-4 || size >= 1e7 ? value.toExponential(4) : value.toPrecision(5);
};

report.cosine = (value) => {
  if (value === null || !Number.isFinite(value)) return "–";
  const rest = Math.abs(1 - value);
  const digits = rest > 0 ? Math.ceil(-Math.log10(rest)) + 3 : 5;
  return value.toFixed(Math.min(8, Math.max(5, digits)));
};

report.show = (name, value) => (report.quantity(name).inverse ? report.cosine(value) : report.number(value));

// For files: what the page holds, without digits that its rounding made.
report.exact = (value) => (Number.isFinite(value) ? String(Number(value.toPrecision(6))) : "");
