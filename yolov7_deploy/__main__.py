"""Entry point of `python -m yolov7_deploy` and of the console command `y7`."""


def main() -> None:
    """Run the command line."""
    from yolov7_deploy.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
