import typer

app = typer.Typer()


@app.command()
def up() -> None: ...
@app.command()
def down() -> None: ...
