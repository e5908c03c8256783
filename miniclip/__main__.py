"""`python -m miniclip` is the `miniclip` command."""

try:
    from .commands.main import main
except KeyboardInterrupt:
    raise SystemExit(130) from None

if __name__ == "__main__":
    main()
