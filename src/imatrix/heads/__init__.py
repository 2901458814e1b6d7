"""Takes an MTP/NextN head out of a model file, or puts one in, without converting again.

    extract.py  a bundled model -> the head, and the trunk if asked
    graft.py    a trunk and a head -> a bundled model
    drop.py     a model -> its trunk, or the model without the claim of a head
    keys.py     the metadata of each half
    source.py   a model that is cut up: its header, and its keys and tensors as bytes
    outputs.py  what is checked before and after a file is written

The two halves are laid out as llama.cpp's convert_hf_to_gguf.py does it (conversion/glm.py,
qwen.py, step3.py, mimo.py, hunyuan.py, bailingmoe3.py, deepseek.py, and the loaders under
src/models/ that take such files):

    bundled             every tensor; block_count = trunk + head; nextn_predict_layers = head
    trunk, --no-mtp     no `blk.<n_trunk>` and on; block_count = trunk; no nextn_predict_layers;
                        per-layer arrays as long as the trunk
    head, --mtp         the head's blocks and the tensors outside the blocks (token_embd,
                        output_norm, output); every key as in the bundled file, the tokenizer too:
                        it is loaded as a model of its own. The converter puts `mtp-` before the
                        file name when it chooses the name itself, and the engine looks for a head
                        under that prefix (common/download.cpp).

What does not change is copied as the bytes that it is (imatrix.model.raw).
"""
