from polyzoo.core.cli import main

raise SystemExit(main(["sea", "train", *__import__("sys").argv[1:]]))
