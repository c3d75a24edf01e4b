<?xml version="1.0"?>
<clustat version="4.1.1">
  <nodes>
    <node name="n1" state="0" local="0" estranged="0" rgmanager="0" rgmanager_master="0" qdisk="0" nodeid="0x00000001"/>
  </nodes>
</clustat>
