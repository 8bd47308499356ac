// Make and find elements. Texts are always text nodes: nothing that a service or a file says becomes markup.

export const byId = (id) => document.getElementById(id);

/** An element with these properties (class, text, on, and attributes by their names) and children. */
export function element(tag, { class: names, text, on = {}, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (names) made.className = names;
  if (text !== undefined) made.textContent = text;
  for (const [event, listener] of Object.entries(on)) made.addEventListener(event, listener);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
