"""How the page looks: colours, type, spacing, for light and dark, wide and narrow.

Gradio's theme sets what has a variable there; the style sheet does the rest. Nothing is
fetched from elsewhere: system fonts, drawings inline.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

EYE = (
    '<svg viewBox="0 0 32 32" width="30" height="30" fill="none" aria-hidden="true">'
    '<path d="M3 16c4-7 8.6-10 13-10s9 3 13 10c-4 7-8.6 10-13 10S7 23 3 16Z" '
    'stroke="currentColor" stroke-width="2.2"/>'
    '<circle cx="16" cy="16" r="5.2" fill="currentColor"/>'
    '<circle cx="18" cy="14" r="1.6" fill="var(--body-background-fill)"/></svg>'
)


def theme() -> gr.themes.Base:
    """Return the theme: paper and ink, one accent."""
    accent = gr.themes.Color(
        c50="#eef6f3", c100="#d6eae3", c200="#aed6c9", c300="#7fbdab", c400="#4f9f8a",
        c500="#2f8470", c600="#1f6d5b", c700="#1a574a", c800="#17463c", c900="#143a32",
        c950="#0a211d",
    )  # fmt: skip
    stone = gr.themes.Color(
        c50="#faf9f7", c100="#f3f1ed", c200="#e6e3dc", c300="#d2cec4", c400="#a39e93",
        c500="#736e65", c600="#57534c", c700="#403d38", c800="#292724", c900="#1c1b19",
        c950="#131210",
    )  # fmt: skip
    base = gr.themes.Base(
        primary_hue=accent,
        secondary_hue=accent,
        neutral_hue=stone,
        radius_size=gr.themes.sizes.radius_lg,
        font=["ui-sans-serif", "system-ui", "Segoe UI", "Helvetica Neue", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        body_text_color_dark="*neutral_100",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="0px",
        block_shadow="none",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_width="1px",
        input_border_color="*neutral_200",
        input_border_color_dark="*neutral_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_hover_dark="*neutral_800",
        button_secondary_border_color="*neutral_200",
        button_secondary_border_color_dark="*neutral_700",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
    )


CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")

# The choice is kept in the browser; without one the page follows the system.
HEAD = """
<meta name="color-scheme" content="light dark">
<script>
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const kept = localStorage.getItem("mmlm-dark");
    document.body.classList.toggle("dark", kept === null ? system.matches : kept === "1");
  };
  // The page is drawn after it was loaded; on a phone the focus would open the keyboard over it.
  const wantsFocus = matchMedia("(pointer: fine)").matches;
  const begin = performance.now();
  const settle = () => {
    const box = document.querySelector("#ask textarea");
    if (!box && performance.now() - begin < 60000) return setTimeout(settle, 100);
    if (box && wantsFocus && document.activeElement === document.body) box.focus();
  };
  // What Gradio leaves without a name or gives a wrong role, for those who hear the page.
  const mend = () => {
    for (const list of document.querySelectorAll(".examples[role=list]"))
      list.setAttribute("role", "group");
    for (const button of document.querySelectorAll("button:not([aria-label]):has(.image-frame)"))
      button.setAttribute("aria-label", "Show the picture larger");
  };
  let due = false;
  const soon = () => {
    if (due) return;
    due = true;
    setTimeout(() => { due = false; mend(); }, 100);
  };
  const start = () => {
    apply();
    settle();
    mend();
    // Gradio sets the class by the system's choice while it draws the page, sooner or later.
    new MutationObserver(apply).observe(document.body, { attributeFilter: ["class"] });
    system.addEventListener("change", apply);
    new MutationObserver(soon).observe(document.body, { childList: true, subtree: true });
  };
  // Gradio may add this head after the page was loaded; then nobody would hear of the load.
  if (document.readyState === "complete") start();
  else addEventListener("load", start);
})();
</script>
"""

SWITCH_DARK = """() => {
  const dark = !document.body.classList.contains("dark");
  localStorage.setItem("mmlm-dark", dark ? "1" : "0");
  document.body.classList.toggle("dark", dark);
}"""

# What the server made is handed to the browser as a file; nothing is kept on the server.
SAVE_FILE = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/html" }));
  link.download = "conversation.html";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""

SWITCH_SETTINGS = """() => document.querySelector("#settings .toggle-button").click()"""

# The address that a kept conversation has on the very page that asks.
LINK_OF = """(name) =>
  name ? location.origin + location.pathname + "?talk=" + encodeURIComponent(name) : ''"""
