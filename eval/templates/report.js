// Filters the lists of questions and samples. Without it the page is whole: all items are there, as <details>.
for (const form of document.querySelectorAll("form.controls")) {
  const list = document.getElementById(form.dataset.list), items = [...list.children];
  const texts = items.map(item => item.textContent.toLowerCase());
  const value = name => form.elements[name] ? form.elements[name].value : "";
  const show = () => {
    let shown = 0;
    items.forEach((item, place) => {
      const fits = (!value("category") || item.dataset.category === value("category")) && texts[place].includes(value("find").toLowerCase());
      item.hidden = !fits;
      shown += fits;
    });
    const key = value("order") === "apart" ? item => -item.dataset.apart : item => Number(item.dataset.number);
    list.append(...[...items].sort((a, b) => key(a) - key(b)));
    form.querySelector("output").textContent = `${shown} of ${items.length}`;
  };
  form.addEventListener("input", show);
  form.elements.toggle.addEventListener("click", () => {
    const open = form.elements.toggle.textContent === "Open all";
    items.forEach(item => { item.open = open && !item.hidden; });
    form.elements.toggle.textContent = open ? "Close all" : "Open all";
  });
  form.hidden = false;
}
