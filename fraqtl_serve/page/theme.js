// Runs before the first paint, so that a theme once chosen doesn't flash.
"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem("fraqtl-theme");
  } catch {} // storage can be forbidden: the system's theme it is then
  const isDark = () => (chosen ? chosen === "dark" : system.matches);

  function apply() {
    if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
    const button = document.getElementById("theme");
    if (button) button.textContent = isDark() ? "Light theme" : "Dark theme";
    document.dispatchEvent(new Event("themechange"));
  }

  apply();
  system.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      chosen = isDark() ? "light" : "dark";
      try {
        localStorage.setItem("fraqtl-theme", chosen);
      } catch {}
      apply();
    });
  });
})();
