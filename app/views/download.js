// Saves a file that was just made. The link is in the page only while it is clicked.
watch("value", () => {
  if (!props.value) return;
  const { file } = props.value;
  const link = Object.assign(document.createElement("a"), { href: file.url, download: file.orig_name });
  element.append(link);
  link.click();
  link.remove();
});
