"""Recipe → lock → tools tree → root file system → verity → initrd: the image that boots, the same bits every time.

The order of the modules is the order of the work: `recipe` (what a person writes), `lock` (every input by version and
digest), `apt` and `store` (inputs fetched and kept by digest), `tools` (the tree in which everything runs), `trees`
(Debian packages → a root), `initrd`, `disk` (EROFS, layers, dm-verity), `image` (all of it), `inspection` (what the
finished image proves about itself).
"""
