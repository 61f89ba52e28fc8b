// The colour scale of heat maps: dark and transparent to bright and less transparent.
report.palette = report.bytes(report.content.colours);
report.opacity = [0.3, 0.78];

// Least and largest value of a list, without those that are not there.
report.ends = (values) => {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : null;
};

// From what to what the colours go; null without any value.
report.range = (scale, values) => {
  const ends = report.ends(values);
  return ends && scale !== "cosine" ? [Math.min(0, ends[0]), ends[1]] : ends;
};

// Where a value lies on the scale, 0 to 1. Cosines go as in the plots: by their distance from 1, logarithmically.
report.share = (scale, ends, given) => {
  const place = scale === "cosine" ? report.axes.cosine.place : (value) => value;
  const [low, high] = ends.map(place), value = place(given);
  const share = high > low ? Math.min(1, Math.max(0, (value - low) / (high - low))) : 0;
  return scale === "sqrt" ? Math.sqrt(share) : share;
};

// Red, green, blue and opacity, 0 to 255.
report.colour = (share) => {
  const at = 3 * Math.round(255 * share);
  const [least, most] = report.opacity;
  return [...report.palette.slice(at, at + 3), Math.round(255 * (least + (most - least) * share))];
};
