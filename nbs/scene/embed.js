// Puts the small page where a page shows its picture: a link to scene/index.html around an
// image, which readers without scripts (and of a code host) see instead. Loaded by
// <script type="module" src="nbs/scene/embed.js"></script>, from wherever the page stands.
for (const image of document.querySelectorAll("a[href*='scene/index.html'] > img")) {
  const frame = document.createElement("iframe"), {href} = image.parentElement
  Object.assign(frame, {src: `${href.split("#")[0]}?small`, title: image.alt, loading: "lazy"})
  frame.style = "width: 100%; height: 30rem; border: 0; color-scheme: normal"
  image.parentElement.replaceWith(frame)
  addEventListener("message", ({source, data}) => {
    if (source === frame.contentWindow && data.sceneHeight > 0)
      frame.style.height = `${data.sceneHeight}px`
  })
}
