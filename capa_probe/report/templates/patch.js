// All numbers of one patch, in the layer that is shown: of the one that is pointed at, else of the chosen one.
report.pointed = -1;

report.shownToken = () => {
  const example = report.example();
  if (!example) return -1;
  return report.pointed >= 0 ? report.pointed : report.tokenAt(example, report.state.patch);
};

report.point = (token) => {
  if (token === report.pointed) return;
  report.pointed = token;
  report.showPatch();
  report.outlinePatch();
};

report.patchTitle = (example, token, layer) => {
  const [image, tile, row, col] = example.places[token];
  const images = new Set(example.places.map((place) => place[0])).size;
  const tiles = new Set(example.places.map((place) => place[1])).size;
  const parts = [`row ${row}, column ${col}`, `position ${example.positions[token]}`];
  if (tiles > 1) parts.unshift(tile < 0 ? "thumbnail" : `tile ${tile}`);
  if (images > 1) parts.unshift(`image ${image + 1}`);
  return `Layer ${layer}: ${parts.join(", ")}`;
};

report.patchRows = (example, token, layer) => {
  const at = layer * example.positions.length + token;
  return report.measured(example).map((quantity) => {
    const value = report.values(example, quantity.name)[at];
    const dim = quantity.name.startsWith("sink_strength")
      ? report.dims(example, quantity.name.replace("strength", "dim"))?.[at] ?? -1 : -1;
    return [quantity, value, dim];
  });
};

report.dimension = (dim, layer) =>
  (dim < 0 ? "" : `dimension ${dim}${report.run().offsets[layer]?.includes(dim) ? ", an offset" : ""}`);

report.showPatch = () => {
  const place = document.getElementById("patch");
  const example = report.example(), token = report.shownToken(), layer = report.layer();
  if (!example || !example.positions.length) return place.replaceChildren();
  place.classList.toggle("filled", token >= 0);
  if (token < 0) {
    return place.replaceChildren(report.element("p", { class: "note" },
      "Point at a patch for its numbers; a click, or the arrow keys on the image, choose one."));
  }
  const role = report.roles(example, layer).get(token);
  const kept = report.kept(example, layer);
  const states = [];
  if (role) states.push({ dump: "Probability Dump", anchor: "Structural Anchor" }[role] ?? "undetermined sink");
  if (kept) states.push(kept.has(token) ? "kept" : "dropped");
  const rows = report.patchRows(example, token, layer).map(([quantity, value, dim]) =>
    report.element("tr", { "data-name": quantity.name },
      report.element("th", { scope: "row", title: quantity.unit }, quantity.label),
      report.element("td", {}, report.show(quantity.name, value)),
      report.element("td", {}, report.dimension(dim, layer))));
  place.replaceChildren(
    report.element("h4", {}, report.patchTitle(example, token, layer)),
    ...(states.length ? [report.element("p", { class: "note" }, states.join(", "))] : []),
    report.element("table", { class: "numbers" }, report.element("tbody", {}, ...rows)));
};
