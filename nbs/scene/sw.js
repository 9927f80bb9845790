// Once loaded, the page needs no network: every file of it is kept here.
importScripts("built/files.js")
const {version, files} = self.BUILD

async function keep() { // what the page itself has not put into the cache yet
  const cache = await caches.open(version)
  for (const file of [...Object.keys(files), "built/files.js"])
    if (!await cache.match(file)) await cache.add(new Request(file, {cache: "no-cache"}))
  await self.skipWaiting()
}

async function forgetOlder() {
  const others = (await caches.keys()).filter(name => name !== version)
  const older = others.filter(name => name.startsWith("paligemma-scene-"))
  await Promise.all(older.map(name => caches.delete(name)))
  await self.clients.claim()
}

async function answer(request) {
  const cache = await caches.open(version), {pathname} = new URL(request.url)
  const file = pathname.endsWith("/") ? "index.html" : request
  const kept = await cache.match(file, {ignoreSearch: true})
  return kept ?? fetch(request)
}

self.addEventListener("install", event => event.waitUntil(keep()))
self.addEventListener("activate", event => event.waitUntil(forgetOlder()))
self.addEventListener("fetch", event => {
  if (event.request.method === "GET") event.respondWith(answer(event.request))
})
