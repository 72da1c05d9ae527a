/* Panels and theme. */

function showSidebar(shown) {
  $("app").classList.toggle("no-sidebar", !shown);
  $("toggle-sidebar").setAttribute("aria-expanded", String(shown));
}

function showSettings(shown) {
  $("settings").hidden = !shown;
  $("toggle-settings").setAttribute("aria-expanded", String(shown));
  (shown ? $("set-temperature") : $("toggle-settings")).focus();
}

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  const [now, then] = [theme === "auto" ? "as the system" : theme, next === "auto" ? "the system's" : next];
  const label = `Theme: ${now}. Change to ${then}`;
  $("theme").replaceChildren(icon(theme));
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
  $("theme").onclick = () => {
    write(THEME_KEY, next);
    setTheme(next);
  };
}
