// Boxes and points in an answer, drawn over its picture. Qwen-VL writes them as JSON, with
// coordinates from 0 to 1,000 in both directions: [{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}].

const SVG = "http://www.w3.org/2000/svg";

function* objects(value) {
  if (Array.isArray(value)) for (const one of value) yield* objects(one);
  else if (value && typeof value === "object") {
    yield value;
    for (const one of Object.values(value)) yield* objects(one);
  }
}

const numbers = (value, length) =>
  Array.isArray(value) && value.length === length && value.every((one) => one >= 0 && one <= 1000);

// Every mark in a text: { box: [x1, y1, x2, y2], label } or { point: [x, y], label }.
export function marks(text) {
  const found = [];
  const json = text.match(/```(?:json)?\s*([\s\S]*?)```/)?.[1] ?? text.slice(text.search(/[[{]/));
  let value;
  try {
    value = JSON.parse(json);
  } catch {
    return found; // prose, or not finished
  }
  for (const one of objects(value)) {
    const label = String(one.label ?? one.text_content ?? "");
    if (numbers(one.bbox_2d, 4)) found.push({ box: one.bbox_2d, label });
    if (numbers(one.point_2d, 2)) found.push({ point: one.point_2d, label });
  }
  return found;
}

function add(parent, name, attributes, text = "") {
  const one = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
  one.textContent = text;
  parent.append(one);
}

// Draws marks over a picture of this size, in its own pixels.
export function draw(found, width, height) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("class", "marks");
  svg.setAttribute("aria-hidden", "true"); // the text says the same
  const [across, down] = [width / 1000, height / 1000];
  const size = Math.max(width, height) / 36;
  found.forEach(({ box, point, label }, index) => {
    const color = `mark-${index % 6}`;
    const [x, y] = [(box ?? point)[0] * across, (box ?? point)[1] * down];
    if (box) {
      const [right, bottom] = [box[2] * across, box[3] * down];
      add(svg, "rect", { x, y, width: Math.max(0, right - x), height: Math.max(0, bottom - y), class: color });
    } else add(svg, "circle", { cx: x, cy: y, r: size / 2, class: color });
    add(svg, "text", { x: x + size / 4, y: Math.max(size, y - size / 4), "font-size": size, class: color }, label);
  });
  return svg;
}
