// Vertical axes: where a value lies, and which values are written beside it.
report.axes = {
  linear: { place: (value) => value },
  log: { place: (value) => (value > 0 ? Math.log10(value) : NaN) },
  cosine: { place: (value) => -Math.log10(Math.max(1 - value, 1e-8)) },
};

report.axes.linear.ticks = (low, high) => {
  const step = report.step((high - low) / 5);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
};

// 1, 2 and 5 times a power of ten; powers alone where there are many.
report.axes.log.ticks = (low, high) => {
  const decades = Math.log10(high / low);
  const parts = decades > 4 ? [1] : decades > 1.2 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const part of parts) ticks.push(Number((part * 10 ** power).toPrecision(3)));
  }
  return ticks.filter((tick) => tick >= low && tick <= high);
};

report.axes.cosine.ticks = (low, high) =>
  report.axes.log.ticks(Math.max(1 - high, 1e-8), 1 - low).map((rest) => Number((1 - rest).toPrecision(10)));

// The nearest of 1, 2, 5, 10 ... that is not less.
report.step = (least) => {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((part) => part * power >= least * (1 - 1e-9));
};

// From what to what an axis goes, with a little room; a linear one starts at 0.
report.limits = (axis, values) => {
  const { place } = report.axes[axis];
  const ends = report.ends(values.map(place).filter(Number.isFinite));
  if (!ends) return null;
  const room = 0.06 * (ends[1] - ends[0] || Math.abs(ends[1]) || 1);
  return axis === "linear" && ends[0] >= 0 ? [0, ends[1] + room] : [ends[0] - room, ends[1] + room];
};

// Ticks between two places of an axis, each with its place; no more than fit.
report.ticksBetween = (axis, [low, high], most) => {
  const { place, ticks } = report.axes[axis];
  const back = { linear: (at) => at, log: (at) => 10 ** at, cosine: (at) => 1 - 10 ** -at }[axis];
  const found = ticks(back(low), back(high)).map((value) => [value, place(value)])
    .filter(([, at]) => at >= low && at <= high);
  const every = Math.ceil(found.length / most);
  return found.filter((_, number) => number % every === 0);
};

report.tickText = (value) => {
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return value.toExponential().replace("e+", "e");
  return String(Number(value.toPrecision(8)));
};
