"""One page of TensorBoard with the charts of all monitors that run ("Custom Scalars")."""

from lightning import Callback, LightningModule, Trainer


class Dashboard(Callback):
    """Writes the layout when training starts: what each monitor's `charts` names, monitors of one title together."""

    title = "monitors"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layout = self.layout(trainer)
        for logger in trainer.loggers if trainer.is_global_zero and layout[self.title] else []:
            if hasattr(logger.experiment, "add_custom_scalars"):
                logger.experiment.add_custom_scalars(layout)

    def layout(self, trainer: Trainer) -> dict[str, dict[str, list]]:
        """{page: {title of a chart: ["Multiline", tags]}}"""
        charts: dict[str, list[str]] = {}
        for monitor in trainer.callbacks:
            for title, tags in monitor.charts().items() if hasattr(monitor, "charts") else ():
                charts.setdefault(title, []).extend(tags)
        return {self.title: {title: ["Multiline", tags] for title, tags in charts.items()}}
