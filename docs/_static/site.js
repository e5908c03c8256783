// What a keyboard needs: boxes that scroll, and the theme's menus, whose buttons are labels of hidden checkboxes.

// A box that scrolls can be scrolled by the keyboard alone if it can have the focus.
const boxes = document.querySelectorAll("pre, .table-wrapper, div.highlight, div.math");
const look = (box) => {
  const scrolls = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
  scrolls ? box.setAttribute("tabindex", "0") : box.removeAttribute("tabindex");
};
const watch = new ResizeObserver((changed) => changed.forEach(({ target }) => look(target)));
boxes.forEach((box) => (look(box), watch.observe(box)));

const drawers = { __navigation: "aside.sidebar-drawer", __toc: "aside.toc-drawer" };
const names = { __navigation: "Pages", __toc: "On this page" };
for (const id in drawers) document.querySelector(drawers[id])?.setAttribute("aria-label", names[id]);

for (const icon of document.querySelectorAll("label[for] > .icon")) {
  const box = document.getElementById(icon.parentElement.htmlFor);
  const show = () => icon.setAttribute("aria-expanded", box.checked);
  icon.setAttribute("role", "button");
  icon.setAttribute("tabindex", "0");
  icon.setAttribute("aria-label", names[box.id] ?? box.getAttribute("aria-label"));
  box.addEventListener("change", show);
  show();
  icon.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    box.click();
    if (box.checked && box.id in drawers) document.querySelector(`${drawers[box.id]} a`)?.focus();
  });
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const id in drawers) {
    const box = document.getElementById(id);
    if (!box?.checked) continue;
    box.click();
    [...document.querySelectorAll(`label[for=${id}] > .icon`)].find((icon) => icon.offsetParent)?.focus();
  }
});
