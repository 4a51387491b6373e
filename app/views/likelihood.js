// Opens what Python sends: the list of scored files, of which one is shown. The first file opens by itself.
async function update() {
  const value = props.value;
  book.items = value?.items ?? [];
  root.hidden = !book.items.some((item) => item.document);
  book.tell("items");
  const stillThere = book.items.find(({ id }) => id === book.item?.id);
  const started = performance.now();
  await book.choose(stillThere ?? book.items.find((item) => item.document) ?? null);
  if (!stillThere && book.file) root.dataset.openms = (performance.now() - started).toFixed(0);
}

watch("value", update);
update();
