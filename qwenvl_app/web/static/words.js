// Every word of the page, in Chinese and in English; the browser's language decides.

const WORDS = {
  zh: {
    title: "看图问答",
    fresh: "新对话",
    status: "运行状态",
    rate: "最近两分钟每秒生成的 token 数",
    demo: "当前是内置的演示模型：只认识浅色背景上的一个彩色圆形、矩形或三角形。认识万物的模型请见 README。",
    key: "此服务需要 API 密钥",
    use: "使用",
    welcome: "问问图片里有什么",
    how: "把图片拖到这里、粘贴，或点“选择图片”。也可以先用一张示例：",
    howPhone: "拍一张照片，或选择一张图片。也可以先用一张示例：",
    log: "对话",
    attached: "将要发送的图片",
    question: "输入关于图片的问题",
    choose: "选择图片",
    photo: "拍照",
    shrink: "大图先缩小再发送",
    stop: "停止",
    send: "提问",
    you: "你",
    model: "模型",
    remove: "移除",
    picture: "图片",
    copy: "复制回答",
    copied: "已复制",
    explain: "说明",
    stopped: "已停止",
    cut: "达到长度上限，回答被截断",
    first: "首字用时",
    written: "写出 token",
    read: "读取 token",
    known: "其中记得",
    queue: "排队",
    image: "打开图片",
    preprocess: "整理图片",
    prefill: "看图读题",
    whole: "总用时",
    need: "请先输入问题。",
    needPicture: "请先放一张图片。",
    notPicture: "{m} 不是图片。",
    sure: "这是什么？",
    loading: "模型加载中",
    ready: "就绪",
    failed: "加载失败",
    draining: "正在停止",
    away: "连不上服务",
    busy: "服务正忙，请在 {s} 秒后重试。",
    notReady: "模型还在加载，上方显示“就绪”后再提问。",
    too_large: "图片或请求太大，请勾选“大图先缩小再发送”后重试。",
    unauthorized: "API 密钥缺失或不正确。",
    deadline: "没有在时限内完成，请稍后重试。",
    broken: "回答中断了，请重试。",
    bad_image: "无法读取这张图片：文件已损坏，或不是支持的格式。",
    other: "服务拒绝了请求：{m}",
    running: "正在回答",
    waiting: "排队中",
    tokens: "每秒写出 token",
    kv: "已用显存额度（token）",
    ttft: "首字平均用时",
    refused: "拒绝与失败",
    none: "无",
    boxes: "{n} 处标注",
  },
  en: {
    title: "Ask about pictures",
    fresh: "New conversation",
    status: "Status",
    rate: "Tokens written a second, last two minutes",
    demo: "This is the embedded demo model: it knows a coloured circle, rectangle or triangle on a pale background, and nothing else. The README tells how to serve one that knows the world.",
    key: "This service asks for an API key",
    use: "Use it",
    welcome: "Ask what is in a picture",
    how: "Drop a picture here, paste one, or choose one. Or begin with a sample:",
    howPhone: "Take a photo, or choose a picture. Or begin with a sample:",
    log: "Conversation",
    attached: "Pictures to be sent",
    question: "Ask something about the picture",
    choose: "Choose pictures",
    photo: "Take a photo",
    shrink: "Make large pictures smaller",
    stop: "Stop",
    send: "Ask",
    you: "You",
    model: "Model",
    remove: "Remove",
    picture: "Picture",
    copy: "Copy answer",
    copied: "Copied",
    explain: "Explain",
    stopped: "Stopped",
    cut: "Cut at the longest length",
    first: "first word after",
    written: "tokens written",
    read: "tokens read",
    known: "remembered",
    queue: "waiting for a place",
    image: "opening the picture",
    preprocess: "preparing it",
    prefill: "looking at it",
    whole: "total",
    need: "Enter a question first.",
    needPicture: "Add a picture first.",
    notPicture: "{m} is not a picture.",
    sure: "What is in this picture?",
    loading: "Loading the model",
    ready: "Ready",
    failed: "Failed to load",
    draining: "Stopping",
    away: "The service can't be reached",
    busy: "The service is busy. Try again in {s} s.",
    notReady: "The model is still loading. Ask again when it says Ready above.",
    too_large: "The picture or the request is too large. Tick “Make large pictures smaller” and try again.",
    unauthorized: "The API key is missing or wrong.",
    deadline: "The answer was not ready in time. Try again later.",
    broken: "The answer broke off. Try again.",
    bad_image: "This picture can't be read: it is damaged, or of an unsupported format.",
    other: "The service refused: {m}",
    running: "Being answered",
    waiting: "Waiting",
    tokens: "Tokens a second",
    kv: "Memory (tokens)",
    ttft: "First word, average",
    refused: "Refused and failed",
    none: "none",
    boxes: "{n} marks",
  },
};

// What a word means that stands for something technical.
const HINTS = {
  zh: {
    shrink: "长边缩到 2048 像素以内：上传和回答更快，但图中小字可能看不清",
    first: "从提问到看见第一个字",
    whole: "从提问到回答写完",
    queue: "名额都被占用时，请求要排队",
    image: "把文件解码成像素",
    preprocess: "把像素切成模型能看的小块",
    prefill: "模型在动笔之前先看图片和问题（prefill）",
    read: "图片和问题折合的 token 数；1 个 token 约为一个字，或图片上 32×32 像素的一块",
    written: "回答的长度；1 个 token 约为一个字",
    running: "正在写的回答数 / 同时能写的回答数",
    waiting: "还没有名额的请求数",
    tokens: "所有回答合计的写出速度",
    kv: "KV 缓存：已占用 / 总量，图片和对话都存放在这里",
    ttft: "自启动以来，从提问到第一个字的平均用时",
    refused: "自启动以来没有得到回答的请求，按原因",
  },
  en: {
    shrink: "To at most 2,048 pixels a side: sent and answered faster, but fine print may be lost",
    first: "From the question to the first word",
    whole: "From the question to the end of the answer",
    queue: "All places were taken, so the request waited",
    image: "Decoding the file to pixels",
    preprocess: "Cutting the pixels into pieces for the model",
    prefill: "The model reads picture and question before it writes (prefill)",
    read: "Length of picture and question: a token is about a word, or 32 × 32 pixels of the picture",
    written: "Length of the answer: a token is about a word",
    running: "Answers being written / as many as can be written at once",
    waiting: "Requests that have no place yet",
    tokens: "How fast all answers together are written",
    kv: "KV cache, used / available: pictures and conversations are kept there",
    ttft: "From the question to the first word, since the start",
    refused: "Requests without an answer since the start, by reason",
  },
};

export const language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
const words = WORDS[language];

export function word(name, values = {}) {
  return words[name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

export const hint = (name) => HINTS[language][name] ?? "";

// Shows and hides the hints inside an element: by mouse, by finger, by key.
export function explainer(within) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: word("explain") });
  button.setAttribute("aria-expanded", "false");
  button.onclick = () => button.setAttribute("aria-expanded", String(within.classList.toggle("explained")));
  return button;
}

// Fills in every element that names a word, in the browser's language.
export function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = `qwenvl · ${word("title")}`;
  for (const one of document.querySelectorAll("[data-word]")) one.textContent = word(one.dataset.word);
  for (const one of document.querySelectorAll("[data-hint]")) one.textContent = hint(one.dataset.hint);
  for (const one of document.querySelectorAll("[data-placeholder]")) one.placeholder = word(one.dataset.placeholder);
  for (const one of document.querySelectorAll("[data-label]")) one.setAttribute("aria-label", word(one.dataset.label));
}
