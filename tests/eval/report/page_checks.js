// Run inside the report: what a person with a keyboard, a screen reader or a phone would stumble over. Posts a list to the parent page.
const found = [], say = text => found.push(text);
const visible = node => node.getClientRects().length > 0 && getComputedStyle(node).visibility !== "hidden";
const name = node => (node.getAttribute("aria-label") || node.textContent || node.title || "").trim();

const ids = [...document.querySelectorAll("[id]")].map(node => node.id);
ids.filter((id, place) => ids.indexOf(id) !== place).forEach(id => say(`id ${id} twice`));
if (!document.documentElement.lang) say("no language");
if (!document.title) say("no title");
if (document.querySelectorAll("main").length !== 1) say("not one main");
let level = 0;
for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
  const now = Number(heading.tagName[1]);
  if (now > level + 1) say(`heading ${name(heading)} skips a level`);
  level = now;
}
for (const link of document.querySelectorAll("a[href^='#']")) if (!document.querySelector(link.hash)) say(`${link.hash} leads nowhere`);
for (const node of document.querySelectorAll("a, button, summary, [role=img], [role=region]")) if (!name(node)) say(`${node.outerHTML.slice(0, 60)} has no name`);
for (const node of document.querySelectorAll("input, select")) if (!node.labels.length) say(`${node.name} has no label`);
for (const node of document.querySelectorAll("svg")) if (!node.closest("[role=img]")) say("a picture without a text");
for (const node of document.querySelectorAll("th")) if (!node.scope) say(`th ${name(node)} has no scope`);
for (const node of document.querySelectorAll(".scroll")) if (node.tabIndex !== 0) say("a region that scrolls can't be reached by keyboard");
for (const attribute of ["aria-labelledby", "aria-describedby"])
  for (const node of document.querySelectorAll(`[${attribute}]`)) if (!document.getElementById(node.getAttribute(attribute))) say(`${attribute} of nothing`);

// WCAG 2.1, 1.4.3: contrast of text against what lies behind it
const channels = colour => colour.match(/[\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, place) => sum + v * [0.2126, 0.7152, 0.0722][place], 0);
const behind = node => {
  for (let at = node; at; at = at.parentElement) {
    const colour = channels(getComputedStyle(at).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !visible(node) || node.closest("script, style, .skip")) continue;
  const style = getComputedStyle(node), [a, b] = [luminance(channels(node.closest("svg") ? style.fill : style.color)), luminance(behind(node))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), size = parseFloat(style.fontSize);
  if (ratio < (size >= 24 || size >= 18.66 && style.fontWeight >= 700 ? 3 : 4.5)) say(`contrast ${ratio.toFixed(2)} of ${name(node).slice(0, 30)}`);
}

if (document.documentElement.scrollWidth > window.innerWidth) say(`${document.documentElement.scrollWidth} px wide in ${window.innerWidth}`);
for (const entry of performance.getEntriesByType("resource")) say(`loaded ${entry.name}`);

// the filter: by text, by category, back to all
const form = document.querySelector("form.controls[data-list=question-list]");
if (form) {
  const list = document.getElementById("question-list"), shown = () => [...list.children].filter(visible).length, all = list.children.length;
  const set = (field, value) => { form.elements[field].value = value; form.dispatchEvent(new Event("input")); };
  if (form.hidden) say("no controls");
  set("find", "needle");
  if (shown() !== 1 || form.querySelector("output").textContent !== `1 of ${all}`) say(`finding a word shows ${shown()}`);
  set("find", "");
  set("category", "math");
  if (shown() !== list.querySelectorAll("[data-category=math]").length) say("choosing a category shows the wrong ones");
  set("category", "");
  if (form.elements.order) {
    set("order", "apart");
    const order = [...list.children].map(item => Number(item.dataset.apart));
    if (order.some((value, place) => place && value > order[place - 1])) say("not in the order of difference");
    set("order", "");
  }
  form.elements.toggle.click();
  if (![...list.children].every(item => item.open)) say("not all open");
  if (shown() !== all) say("not all shown");
}
parent.postMessage({width: window.innerWidth, found, dark: matchMedia("(prefers-color-scheme: dark)").matches}, "*");
