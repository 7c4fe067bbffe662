from polyzoo.core.cli import main

raise SystemExit(main(["icons", "build", *__import__("sys").argv[1:]]))
