"use strict";
// What the page knows, and how its arrays are read. capa_probe/report/encoding.py says how they are written.
const report = {};
report.content = JSON.parse(document.getElementById("content").textContent);

report.bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

// float24: of a float's 32 bits the sign is left out and the next 24 are kept, least significant byte first. Some
// columns are written as 1 - x.
report.floats = (text, inverse = false) => {
  const bytes = report.bytes(text);
  const bits = new Uint32Array(bytes.length / 3);
  for (let i = 0; i < bits.length; i++) {
    bits[i] = ((bytes[3 * i] << 8) | (bytes[3 * i + 1] << 16) | (bytes[3 * i + 2] << 24)) >>> 1;
  }
  const values = new Float32Array(bits.buffer);
  return inverse ? Float64Array.from(values, (value) => 1 - value) : values;
};

// Two bytes each, least significant first; 65535 is none.
report.indices = (text) => {
  const bytes = report.bytes(text);
  return Array.from({ length: bytes.length / 2 }, (_, i) => {
    const index = bytes[2 * i] | (bytes[2 * i + 1] << 8);
    return index === 65535 ? -1 : index;
  });
};

report.quantities = report.content.quantities;
report.quantity = (name) => report.quantities.find((quantity) => quantity.name === name);

// Words of others inside a sentence: what runs from right to left, or turns directions round, must not leave its place.
report.isolate = (text) => (/[\u0590-\u08ff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufdff\ufe70-\ufeff]/.test(text)
  ? `\u2068${text}\u2069` : text);

// An element with attributes, and with text or elements in it. Text stays text, whatever is in it.
report.element = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

report.svg = (tag, attributes = {}, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
