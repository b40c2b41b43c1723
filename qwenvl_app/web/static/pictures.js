// Pictures on their way to the service.

const LONGEST = 2048;

// A file as a data URL.
export function dataURL(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    // A file system may know no type of it; the service goes by the bytes.
    reader.readAsDataURL(file.type.startsWith("image/") ? file : new Blob([file], { type: "image/jpeg" }));
  });
}

// The file, or a smaller JPEG of it if it is large; what the browser can't decode stays as it is.
export async function shrunk(file) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  const scale = bitmap ? LONGEST / Math.max(bitmap.width, bitmap.height) : 1;
  if (scale >= 1) return file;
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  return new File([blob], file.name.replace(/\.\w+$/, "") + ".jpg", { type: "image/jpeg" });
}
