"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const complete = (node, text, attributes) => {
  if (text !== undefined) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};
const make = (tag, text, attributes = {}) => complete(document.createElement(tag), text, attributes);
const draw = (tag, attributes, text) => complete(document.createElementNS("http://www.w3.org/2000/svg", tag), text, attributes);
