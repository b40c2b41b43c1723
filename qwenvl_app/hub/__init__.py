"""Finding models on ModelScope and Hugging Face, and downloading them."""
