// Brings the scene to life in a page: a paragraph that is nothing but a link to
// scene/index.html, which a code host, JupyterLab and readers without scripts show as it is,
// gets a button. It puts the small page in the link's place; before, no model is loaded.
// The site's build (.ci/pages.py) adds the <script type="module"> that loads this file.
import "./built/files.js" // sets self.BUILD: the files of the page with their sizes

const bytes = Object.values(self.BUILD.files).reduce((sum, size) => sum + size, 0)
const mega = (bytes / 1e6).toFixed(0)

function openScene(link) {
  const frame = document.createElement("iframe")
  frame.src = `${link.href}?small`
  frame.title = link.querySelector("img")?.alt ?? link.textContent
  frame.style = "display: block; width: 100%; height: 30rem; margin: 1rem 0; border: 0"
  const dress = () => { // as the page around it, where that has chosen light or dark
    const theme = document.body.className.match(/quarto-(light|dark)/)?.[1]
    const dark = frame.contentDocument?.getElementById("dark")
    frame.style.colorScheme = theme ?? "normal"
    if (dark && theme) dark.media = theme === "dark" ? "all" : "not all"
  }
  frame.onload = dress
  new MutationObserver(dress).observe(document.body, {attributeFilter: ["class"]})
  addEventListener("message", ({source, data}) => {
    if (source === frame.contentWindow && data.sceneHeight > 0)
      frame.style.height = `${data.sceneHeight}px`
  })
  ;(link.closest("figure") ?? link.parentElement).replaceWith(frame)
}

for (const link of document.querySelectorAll("p > a:only-child[href$='scene/index.html']")) {
  if (link.textContent.trim() !== link.parentElement.textContent.trim()) continue
  const button = document.createElement("button")
  button.textContent = `▶ Ask it here: loads ${mega} MB, runs in this page`
  button.style = `display: block; margin: .5rem 0; padding: .5rem 1rem; border: 0;
    border-radius: 8px; background: #4338ca; color: #fff; font: inherit; cursor: pointer`
  button.onclick = () => openScene(link)
  link.after(button)
}
